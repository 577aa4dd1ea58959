#!/bin/bash
# Text to tokens: on a Slurm cluster a job array over the files, then one job that joins their parts; or all of it here.
#
#   export INPUT='SlimPajama/train/*/*.jsonl.zst' OUTPUT=data/train      from the repository's root
#   sbatch launch/tokenize.sh
#   sbatch --array=0-63 --cpus-per-task=32 launch/tokenize.sh            task I of 64 takes files I, I + 64, …
#   bash launch/tokenize.sh                                              without Slurm, on all cores
#
# From the environment or launch/site.env (see launch/site.env.example):
#   INPUT             globs of .jsonl, .jsonl.gz, .jsonl.zst files, with spaces between them
#   OUTPUT            prefix of the shard; the parts are under OUTPUT.parts/
#   TOKENIZER         SentencePiece model file, or mistral [mistral]
#   BAD_DIR           folder for records that can't be used [none: the first one is an error]
#   TOKENS            how many to choose for a dataset, like 100e9 or all [none: the parts are joined as they are]
#   SUBSET_OUTPUT     the dataset's folder, with TOKENS
#   SEED, EXCLUDE     with TOKENS: of the choice [0]; prefixes of corpora whose documents are left out, like OUTPUT
#   JOIN_OPTIONS      sbatch's options for the joining job [--time=24:00:00]
#   MAX_TRIES         attempts of a job while nothing gets finished [3]
#
# First: python -m data_tools.tokenize --input … --tokenizer … --output … --dry-run    says what it will cost
#
# Finished files are never done again, so every job may be stopped at any moment, and the same command goes on:
#   USR1, 120 s before the time limit    the files at hand are given up, requeued
#   killed                               requeued
#   an error, like a broken record       exit 1: another attempt would end in the same way
# The joining job starts when all tasks have ended well, and is cancelled when one has failed: mend it and submit again.

# Slurm loses the whole log where --output's directory is missing: this one, the submit directory, is there.
#SBATCH --job-name=tokenize
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-cpu=2G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
if [[ -f launch/site.env ]]; then
    set -a # Python needs its variables too
    # shellcheck source=/dev/null
    source launch/site.env
    set +a
fi
set -uo pipefail # from here on: clusters' own scripts use unset variables

attempt=${SLURM_RESTART_COUNT:-0} job='' stop=0 terminated=0 interrupted=0 worker=''

say() { echo "[$(date +%FT%T)] ${job:+$job.$attempt: }$*"; }

fail() {
    say "$*"
    exit 1
}

# shellcheck disable=SC2317 # called by the traps
interrupt() {
    interrupted=1
    say "$1"
    [[ -z $worker ]] || kill -INT "$worker" 2>/dev/null
}
trap 'stop=1; interrupt "USR1: the time limit is near"' USR1
trap 'terminated=1; interrupt "told to end"' TERM INT

# Run Python, in the background because bash runs a trap only between commands or inside `wait`; returns its exit code.
run() {
    local code=127 waited
    ((stop || terminated)) && return 130
    say "python $*"
    set -m # or Python would start with INT ignored, as bash has it for what runs in the background
    python "$@" &
    worker=$!
    set +m # or `wait` would return where Python is only suspended
    while true; do
        interrupted=0
        wait "$worker"
        waited=$?
        # 127 after an interruption: the first `wait` had the exit code already.
        ((waited == 127)) && break
        code=$waited
        ((interrupted)) || break
    done
    worker=''
    return "$code"
}

tokenize() {
    run -m data_tools.tokenize --input "${inputs[@]}" --tokenizer "$TOKENIZER" --output "$OUTPUT" \
        --workers "$workers" ${BAD_DIR:+--bad-dir "$BAD_DIR"} "$@"
}

choose() {
    run -m data_tools.subset --input "$OUTPUT" ${EXCLUDE:+--exclude "${excluded[@]}"} \
        --tokens "$TOKENS" --seed "$SEED" --output "$SUBSET_OUTPUT" --workers "$workers"
}

say_next() {
    local data=$OUTPUT
    [[ -z ${TOKENS:-} ]] || data=$SUBSET_OUTPUT
    say "done; next: python -m data_tools.inspect $data, and train with data.train=$data"
    [[ -n ${TOKENS:-} ]] ||
        say "or choose from it: python -m data_tools.subset --input $OUTPUT --tokens 100e9 --seed 0 --output DIR"
}

# Jobs.

finished_parts() { find "$OUTPUT.parts" -maxdepth 1 -name '*.done.json' 2>/dev/null | wc -l; }

requeue() {
    say "requeue: $1"
    trap '' USR1 TERM # Slurm ends this attempt with TERM
    scontrol requeue "$job" || fail "scontrol requeue failed: submit again to go on"
    exit 0
}

# What a job does after its work has ended with this exit code, when so many parts had been there at its start.
decide() { # code, parts
    local now why
    ((terminated)) && exit 143 # Slurm itself requeues what it preempts, and not what scancel ends
    (($1 == 0)) && return
    now=$(finished_parts)
    say "ended with $1; finished files: $2 at the start, $now now; the same command goes on from there"
    ((stop || $1 > 128)) || fail "not requeued, since another attempt would end in the same way"
    why="killed by signal $(($1 - 128))"
    ((stop)) && why="time limit"
    # The new parts may be another task's; those will all be there some time, so that this ends, too.
    ((now > $2 || attempt + 1 < ${MAX_TRIES:-3})) && requeue "$why"
    fail "giving up: $why, and nothing finished in attempt $((attempt + 1))"
}

# Submitted by the first task alone. If it is killed before it has noted that, there is a second joining job, which
# waits for the first, as it has its name, and finds nothing to do. What --wrap runs has no #SBATCH lines.
submit_join() {
    local noted=$OUTPUT.parts/join.$SLURM_ARRAY_JOB_ID id options
    if [[ ! -s $noted ]]; then
        options=(--job-name="$SLURM_JOB_NAME-join-$SLURM_ARRAY_JOB_ID" --output="$SLURM_JOB_NAME-%j.out"
            --open-mode=append --nodes=1 --ntasks=1 --cpus-per-task="$workers" --mem-per-cpu=2G --signal=B:USR1@120
            --requeue --partition="$SLURM_JOB_PARTITION" ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"}
            ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} "${join_options[@]}"
            --dependency="afterok:$SLURM_ARRAY_JOB_ID,singleton" --kill-on-invalid-dep=yes)
        # sbatch hands this task's environment on.
        id=$(env -u SLURM_RESTART_COUNT sbatch --parsable "${options[@]}" --wrap="bash launch/tokenize.sh join") &&
            mkdir -p "$OUTPUT.parts" && echo "$id" >"$noted"
    fi
    if [[ -s $noted ]]; then
        say "job $(<"$noted") joins the parts once all tasks have ended well"
    else
        say "could not submit the joining job; once all tasks have ended well:" \
            "sbatch --cpus-per-task=$workers ${join_options[*]} --wrap='bash launch/tokenize.sh join'"
    fi
}

# This task's part of the files.
make_parts() {
    local step=${SLURM_ARRAY_TASK_STEP:-1} task
    # shellcheck disable=SC2153 # Slurm's
    task=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / step))
    (((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN) / step + 1 == SLURM_ARRAY_TASK_COUNT)) ||
        fail "an array with gaps leaves files out: submit a whole one, like --array=0-15; finished files stay"
    ((task == 0)) && submit_join
    tokenize --parts-only --task "$task/$SLURM_ARRAY_TASK_COUNT"
}

[[ -f data_tools/tokenize.py ]] || fail "run me from the repository's root"
[[ -n ${INPUT:-} ]] || fail "set INPUT to globs, like 'SlimPajama/train/*/*.jsonl.zst'"
[[ -n ${OUTPUT:-} ]] || fail "set OUTPUT to a prefix, like data/train"
[[ -z ${TOKENS:-} || -n ${SUBSET_OUTPUT:-} ]] || fail "with TOKENS, set SUBSET_OUTPUT to a folder for the dataset"
# To the end and not of the first line, which ends with 1; it expands no glob.
read -rd '' -a inputs <<<"$INPUT"
read -rd '' -a excluded <<<"${EXCLUDE:-}"
read -rd '' -a join_options <<<"${JOIN_OPTIONS:---time=24:00:00}"
TOKENIZER=${TOKENIZER:-mistral} SEED=${SEED:-0}
workers=${SLURM_CPUS_PER_TASK:-$(env -u OMP_NUM_THREADS nproc)} # which that variable limits

if [[ ${1:-} == join ]]; then
    job=${SLURM_JOB_ID:?join is for a job of its own} before=$(finished_parts)
    if [[ -n ${TOKENS:-} ]]; then choose; else tokenize; fi
    decide "$?" "$before"
    say_next
elif [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    # Not $SLURM_JOB_ID: that of an array's last task is the array's, and a requeue of that is one of all tasks.
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID before=$(finished_parts)
    make_parts
    decide "$?" "$before"
    say "done"
else
    if [[ -n ${TOKENS:-} ]]; then tokenize --parts-only && choose; else tokenize; fi || exit
    say_next
fi

#!/bin/bash
# Train on a Slurm cluster until the run is complete, across time limits, preemptions and crashes.
#
#   sbatch launch/1p3b.sh [key=value …]                       from the repository's root
#   CONFIG=launch/configs/350m.yaml sbatch --nodes=1 --job-name=350m launch/1p3b.sh
#
# Arguments are overrides of the config, as for pretrain.train; sbatch's own options override the
# lines below. First ask `python -m pretrain.plan` whether it fits. The trainer resumes from its
# newest checkpoint by itself, so that submitting again continues a run. Everything is logged in
# RUN/logs/JOB.ATTEMPT/ (RUN: run_dir=…, else runs/ and the config's name).
#
# From the environment or launch/site.env (see launch/site.env.example):
#   CONFIG          the config file [launch/configs/1p3b.yaml]
#   GPUS_PER_NODE   processes on each node [what Slurm gave]
#   MAX_TRIES       attempts in a row that end in error without a newer checkpoint [3]

# Slurm loses the whole log where --output's directory is missing: this one, the submit directory, is there.
#SBATCH --job-name=1p3b
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
# To this shell alone, 600 s before the limit: time for a step and a checkpoint.
#SBATCH --signal=B:USR1@600
#SBATCH --requeue

cd "${SLURM_SUBMIT_DIR:?submit me: sbatch launch/1p3b.sh}" || exit 1

if [[ -f launch/site.env ]]; then
    set -a # workers need its variables too
    # shellcheck source=/dev/null
    source launch/site.env
    set +a
fi
set -uo pipefail # from here on: clusters' own scripts use unset variables

config=${CONFIG:-launch/configs/1p3b.yaml}
run=runs/$(basename "$config" .yaml)
for argument in "$@"; do
    [[ $argument == run_dir=* ]] && run=${argument#run_dir=}
done
attempt=${SLURM_RESTART_COUNT:-0}
logs=$run/logs/$SLURM_JOB_ID.$attempt
tries_file=$run/tries_without_progress
max_tries=${MAX_TRIES:-3}

say() { echo "[$(date +%FT%T)] $SLURM_JOB_ID.$attempt: $*"; }

newest_checkpoint() { cat "$run/latest" 2>/dev/null; } # like step_00000500, or nothing

# Signals. bash runs a trap only between commands or inside `wait`, so steps run in the background.
step='' stop=0 terminated=0 interrupted=0

# shellcheck disable=SC2317 # called by the traps
pass_on_stop() { # srun sends it to every process of the step
    interrupted=1
    [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null
}
trap 'stop=1; say "USR1: checkpoint and stop"; pass_on_stop' USR1
trap 'terminated=1; say "TERM: cancelled or preempted"; pass_on_stop' TERM

# Run a command in the background and return its exit code, whatever signals come meanwhile.
run_step() {
    local code=127 waited
    "$@" &
    step=$!
    while true; do
        interrupted=0
        wait "$step"
        waited=$?
        # 127 after an interruption: the first `wait` had the exit code already.
        ((waited == 127)) && break
        code=$waited
        ((interrupted)) || break
    done
    step=
    return "$code"
}

requeue() {
    say "requeue: $1"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    say "scontrol requeue failed: submit again to continue"
    exit 1
}

# After an error: requeue, unless $max_tries attempts in a row brought no newer checkpoint.
retry() {
    local reason=$1 before=$2 tries
    tries=$(($(cat "$tries_file" 2>/dev/null || echo 0) + 1))
    [[ $(newest_checkpoint) > $before ]] && tries=0
    if ((tries >= max_tries)); then
        rm -f "$tries_file" # the next submission counts anew
        say "giving up: $reason, and no newer checkpoint in $tries tries; see $logs"
        exit 1
    fi
    echo "$tries" >"$tries_file.new" && mv "$tries_file.new" "$tries_file"
    requeue "$reason; tries without progress: $tries of $max_tries"
}

if [[ -e $run/DONE ]]; then
    say "$run is done"
    exit 0
fi
mkdir -p "$logs" || exit 1

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
nodes=${#hosts[@]}
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:?no GPUs given by Slurm; set GPUS_PER_NODE}}
# Another port at each attempt: the last one's sockets may linger.
port=$((15000 + (SLURM_JOB_ID + attempt) % 15000))
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
# On a shared disk, nodes would race for the compiled kernels.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$(id -un)}

# srun no longer inherits --cpus-per-task (Slurm 22.05).
on_each_node=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 --wait=60 --label)
# Static ranks: with c10d rendezvous, rank 0 may land on any node. The agent must outlive USR1, which
# its workers turn into a checkpoint: ignored here, it stays so until they install their handlers.
# shellcheck disable=SC2016 # SLURM_NODEID is each node's own
launch='trap "" USR1
    exec torchrun --node_rank="$SLURM_NODEID" --log_dir="$0/node$SLURM_NODEID" "$@"'
torchrun_options=(--nnodes="$nodes" --nproc_per_node="$gpus"
    --master_addr="${hosts[0]}" --master_port="$port" --max_restarts=0
    --tee=3 --local_ranks_filter=0) # every rank to its file, each node's first here too

before=$(newest_checkpoint)
say "$nodes nodes (${hosts[*]}) × $gpus GPUs, $config, from ${before:-the start}; logs in $logs"

run_step "${on_each_node[@]}" bash launch/preflight.sh "$gpus" "$config" "run_dir=$run" "$@"
code=$?
((stop)) && requeue "time limit during preflight"
((terminated)) && exit 143
((code == 0)) || retry "preflight failed ($code)" "$before"

run_step "${on_each_node[@]}" bash -c "$launch" "$logs" "${torchrun_options[@]}" \
    -m pretrain.train "$config" "run_dir=$run" "$@"
code=$?
say "training ended with $code at ${before:-the start} -> $(newest_checkpoint)"
if [[ -e $run/DONE ]]; then
    rm -f "$tries_file"
    say "done"
    exit 0
fi
((stop && code == 0)) && requeue "time limit, checkpoint saved"
((terminated)) && exit 143 # Slurm itself requeues what it preempts
((code == 0)) && requeue "stopped by a signal, checkpoint saved"
retry "training failed ($code)" "$before"

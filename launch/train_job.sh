# shellcheck shell=bash
# The body of the sbatch scripts beside it, which source it with CONFIG set: check the nodes, train, decide what next.
#
#   key=value …       overrides of the config; run_dir=… is where the run is kept [runs/ and the config's name]
#   --allow KEY       what may differ from the checkpoint that the run resumes from; may be repeated
#   --from-step N     go back to the checkpoint of step N; once this job has written one, it goes on from the newest
#
# From the environment or launch/site.env (see launch/site.env.example):
#   GPUS_PER_NODE     processes on each node [what Slurm gave]
#   MAX_TRIES         attempts in a row that end in error without a newer checkpoint [3]
#
# How an attempt ends (RUN: the run's directory):
#   RUN/DONE                             exit 0; the later links of a chain or job array end at once
#   RUN/STOP, made by a person           saved, exit 0; nothing starts until it is removed
#   USR1, 600 s before the time limit    saved, requeued
#   TERM                                 saved, exit 143: Slurm itself requeues what it preempts, not what scancel ends
#   status.json: bad_input, not_finite   exit 1: the next attempt would end in the same way
#   a bad node                           excluded (RUN/excluded_nodes), requeued
#   a crash, a hang, a full disk         requeued; given up after MAX_TRIES
#
# RUN/logs/JOB.ATTEMPT/ holds each rank's output (node0/… and fabric/), the nodes' checks (preflight/), NCCL's log
# (nccl.*) and what its flight recorder dumps when a collective takes too long (flight_recorder/).

attempt=${SLURM_RESTART_COUNT:-0}
stop=0 terminated=0 interrupted=0 training=0 step='' logs=''
# An array's last task has the array's own number, and a requeue of that is one of all its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

say() { echo "[$(date +%FT%T)] $SLURM_JOB_ID.$attempt: $*"; }

# Signals, before anything else: Slurm sends USR1 once. bash runs a trap only between commands or inside `wait`, so
# steps run in the background. The file reaches a trainer that is still starting, srun's signal one in a long step.

# shellcheck disable=SC2317 # called by the traps
ask_to_stop() {
    interrupted=1
    [[ -z $logs ]] || : >"$logs/STOP"
    ((training)) && [[ -n $step ]] && kill -USR1 "$step" 2>/dev/null
}
trap 'stop=1; say "USR1: save and stop"; ask_to_stop' USR1
trap 'terminated=1; say "TERM: cancelled or preempted"; ask_to_stop' TERM

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

# What is known about the run.

newest_checkpoint() { cat "$run/latest" 2>/dev/null; } # like step_00000500, or nothing

progressed() { # has this attempt written a newer checkpoint than the one it started from?
    if ((going_back)); then
        [[ $run/latest -nt $went_back ]]
    else
        [[ $(newest_checkpoint) > $before ]]
    fi
}

# A text of the trainer's status.json; nothing if this attempt has not written it.
status() {
    local line
    line=$(cat "$run/status.json" 2>/dev/null)
    [[ $line == "$status_before" ]] || sed -nE "s/.*\"$1\":\"(([^\"\\\\]|\\\\.)*)\".*/\1/p" <<<"$line"
}

# How an attempt ends.

give_up() {
    rm -f "$tries_file" # the next submission counts anew
    say "giving up: $1; logs in $logs"
    exit 1
}

end_stopped() {
    say "stopped by $run/STOP at ${1:-the start}; to go on: remove it and submit again"
    exit 0
}

# Slurm then ends this attempt: what is still to be done ignores its TERM, and has until KillWait (30 s).
requeue() { # why, [nodes to exclude]
    local avoided=''
    [[ -z ${2:-} ]] || avoided=$(avoiding "$2") || say "not excluding $2: the partition has too few others"
    say "requeue: $1"
    trap '' USR1 TERM
    if ! scontrol requeue "$job"; then
        say "scontrol requeue failed: submit again to continue"
        exit 1
    fi
    [[ -z $avoided ]] || exclude "$2" "$avoided"
    exit 0
}

# After an error: requeue, unless $max_tries attempts in a row brought no newer checkpoint.
retry() { # why, [nodes to exclude]
    local tries
    ((terminated)) && exit 143 # a node died, say, and Slurm has requeued the job: that is no failed try
    tries=$(($(cat "$tries_file" 2>/dev/null || echo 0) + 1))
    progressed && tries=0
    ((tries >= max_tries)) && give_up "$1, and no newer checkpoint in $tries tries"
    # Without the count, a full disk would have the job requeued for ever.
    { echo "$tries" >"$tries_file.new" && mv "$tries_file.new" "$tries_file"; } || give_up "$1, and cannot count that"
    requeue "$1; tries without progress: $tries of $max_tries" "${2:-}"
}

end_if_signalled() { # before training
    ((terminated)) && exit 143
    ((stop)) && requeue "time limit before training"
    return 0
}

# Excluding nodes.

# The job's list of nodes to avoid with these added; fails where the partition has too few others.
avoiding() {
    local now left
    now=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -nE 's/.* ExcNodeList=([^ ]*).*/\1/p') || return
    [[ $now == '(null)' ]] && now=
    left=$(comm -13 <(scontrol show hostnames "${now:+$now,}$1" | sort -u) \
        <(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N | sort -u) | wc -l)
    ((left >= nodes)) && echo "${now:+$now,}$1"
}

# Slurm changes a job's list only while the job is pending: after the requeue, by what is left of this attempt.
exclude() { # bad nodes, the whole list
    local node why
    if ! scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$2"; then
        say "could not exclude $1: while the job is pending, scontrol update JobId=$SLURM_JOB_ID ExcNodeList=$2"
        return
    fi
    for node in ${1//,/ }; do
        why=$logs/preflight/$node.json
        [[ -e $why ]] || why="no report from it in $logs/preflight"
        printf '%s  %s  job %s.%s  %s\n' "$node" "$(date +%FT%T)" "$SLURM_JOB_ID" "$attempt" "$why"
    done >>"$run/excluded_nodes"
    say "excluded from this job: $1 (noted in $run/excluded_nodes)"
}

# Checking the nodes: each alone, so that a broken one cannot hide the others' findings, then all together.

# Print the table of all nodes' findings and set bad_nodes; fails where one is bad.
report_nodes() {
    local text code
    text=$(python -m launch.preflight report "$logs/preflight" --expect "$(IFS=, && echo "${hosts[*]}")" 2>&1)
    code=$?
    printf '%s\n' "$text"
    bad_nodes=$(sed -n 's/^bad nodes: //p' <<<"$text" | tail -n 1)
    return "$code"
}

preflight_failed() { # why
    local bad
    IFS=, read -ra bad <<<"$bad_nodes"
    if ((nodes > 1 && ${#bad[@]} == nodes)); then
        retry "$1: every node is bad, so it is not the nodes"
    fi
    retry "$1${bad_nodes:+: bad nodes: $bad_nodes}" "$bad_nodes"
}

check_each_node() {
    local code
    end_if_signalled
    # The limits: a check that hangs ends on its node; for a node that is dead, the others wait no longer than this.
    run_step timeout 180 "${on_each_node[@]}" --kill-on-bad-exit=0 --wait=0 --no-kill \
        --output="$logs/preflight/%N.txt" --error=all \
        bash -c "$check_node" "$logs/preflight" --gpus "$gpus" --run-dir "$run" --head-time "$(date +%s)" \
        --config "$CONFIG" "run_dir=$run" "${overrides[@]}"
    code=$?
    end_if_signalled
    report_nodes && ((code == 0)) && return
    ((code == 2)) && give_up "the config or a setting is wrong, see above"
    preflight_failed "preflight failed ($code)"
}

check_all_together() {
    local code
    run_step timeout 150 "${agents[@]}" "$logs/fabric" "${torchrun_options[@]}" --master_port="$((port + 1))" \
        -m launch.preflight fabric --report "$logs/preflight/fabric.json"
    code=$?
    end_if_signalled
    ((code == 0)) && return
    report_nodes # with what they found together
    preflight_failed "preflight of all nodes together failed ($code)"
}

train() {
    training=1
    run_step "${agents[@]}" "$logs" "${torchrun_options[@]}" --master_port="$port" \
        -m pretrain.train "$CONFIG" "run_dir=$run" "${overrides[@]}" "${options[@]}" --stop-file "$logs/STOP"
}

# What the job does after training has ended with this exit code.
decide() {
    local reason now
    reason=$(status reason) now=$(newest_checkpoint)
    say "training ended with $1 (${reason:-no status}) at ${before:-the start} -> $now"
    if [[ -e $run/DONE ]]; then
        rm -f "$tries_file"
        say "done"
        exit 0
    fi
    ((terminated)) && exit 143
    [[ -e $run/STOP || $reason == stop_file ]] && end_stopped "$now"
    [[ $reason == bad_input || $reason == not_finite ]] && give_up "$reason: $(status detail)"
    if (($1 == 0)) && { ((stop)) || [[ $reason == signal ]]; }; then
        requeue "stopped by a signal, checkpoint saved"
    fi
    retry "training failed ($1${reason:+, $reason: $(status detail)})"
}

# The job.

overrides=() options=() from_step='' run=runs/$(basename "$CONFIG" .yaml)
while (($#)); do
    case $1 in
        run_dir=*) run=${1#run_dir=} ;;
        [!-]*=*) overrides+=("$1") ;;
        --allow=* | --from-step=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
        --allow) options+=(--allow "${2:?--allow takes a key, like data}") && shift ;;
        --from-step) from_step=${2:?--from-step takes a number of steps} && shift ;;
        *) say "unknown argument $1: there are key=value, --allow KEY and --from-step N" && exit 1 ;;
    esac
    shift
done

if [[ -f launch/site.env ]]; then
    set -a # workers need its variables too
    # shellcheck source=/dev/null
    source launch/site.env
    set +a
fi
set -uo pipefail # from here on: clusters' own scripts use unset variables

tries_file=$run/tries_without_progress max_tries=${MAX_TRIES:-3}
if [[ -e $run/DONE ]]; then
    say "$run is done"
    exit 0
fi
[[ -e $run/STOP ]] && end_stopped "$(newest_checkpoint)"
mkdir -p "$run/logs/$SLURM_JOB_ID.$attempt"/{preflight,fabric,flight_recorder} || exit 1
logs=$run/logs/$SLURM_JOB_ID.$attempt

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
nodes=${#hosts[@]} bad_nodes=''
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:?no GPUs given by Slurm; set GPUS_PER_NODE}}
# A node's name need not be known to the others' resolvers, its address is.
head=$(scontrol show node --oneliner "${hosts[0]}" | sed -nE 's/.* NodeAddr=([^ ]+).*/\1/p')
# Other ports at each attempt: the last one's sockets may linger.
port=$((15000 + 2 * ((SLURM_JOB_ID + attempt) % 7500)))

export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
# On a shared disk, nodes would race for the compiled kernels.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$(id -un)}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} NCCL_DEBUG_FILE=$PWD/$logs/nccl.%h.%p
# The last collectives of each rank, written down where one takes too long: torch's own analyser reads them.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE=$PWD/$logs/flight_recorder/rank_

# srun no longer inherits --cpus-per-task (Slurm 22.05). Overlap: a step may start before a node has reported the end
# of the one before, which still holds the GPUs then.
on_each_node=(srun --overlap --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --label)
# shellcheck disable=SC2016 # here and below: each node's own variables
check_node='exec timeout --kill-after=5 120 \
    python -m launch.preflight node --report "$0/$SLURMD_NODENAME.json" "$@"'
# Static ranks: with c10d rendezvous, rank 0 may land on any node. The agent must outlive USR1, which
# its workers turn into a checkpoint: ignored here, it stays so until they install their handlers.
# shellcheck disable=SC2016
run_agent='trap "" USR1
    exec torchrun --node_rank="$SLURM_NODEID" --log_dir="$0/node$SLURM_NODEID" "$@"'
agents=("${on_each_node[@]}" --kill-on-bad-exit=1 --wait=60 bash -c "$run_agent")
torchrun_options=(--nnodes="$nodes" --nproc_per_node="$gpus" --master_addr="${head:-${hosts[0]}}" --max_restarts=0
    --tee=3 --local_ranks_filter=0) # every rank to its file, each node's first here too

before=$(newest_checkpoint) status_before=$(cat "$run/status.json" 2>/dev/null)
# An array's tasks share their arguments: only its first goes back.
went_back=$run/logs/went_back.${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID} going_back=0
if [[ -n $from_step ]]; then
    [[ -e $went_back ]] || : >"$went_back"
    if [[ ! $run/latest -nt $went_back ]]; then
        going_back=1 options+=(--from-step "$from_step")
    fi
fi

say "$nodes nodes (${hosts[*]}) × $gpus GPUs, $CONFIG, from ${options[*]:-${before:-the start}}; logs in $logs"
check_each_node
check_all_together
train
decide "$?"

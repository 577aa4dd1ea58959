#!/bin/bash
# One node's check before training, run on each by srun: GPUs, disks, Python, config.
#
#   bash launch/preflight.sh GPUS CONFIG run_dir=RUN [key=value …]
#
# Prints every problem with the node's name; exit code 1 where there is one.
# From the environment: MIN_FREE_GIB, on the run's disk [100]; MIN_TMP_GIB, in /tmp, for compiled kernels [2].

set -uo pipefail
gpus=${1:?GPUs expected on this node} config=${2:?config file} run=${3:?run_dir=RUN}
shift 2
run=${run#run_dir=}
failed=0

problem() {
    echo "preflight: ${SLURMD_NODENAME:-$(hostname)}: $*" >&2
    failed=1
}

check_free() { # directory, GiB
    local free
    free=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }')
    [[ -n $free ]] || problem "no disk at $1"
    ((${free:-0} >= $2)) || problem "$1 has ${free:-no} GiB free, needs $2"
}

seen=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')
((seen >= gpus)) || problem "$seen GPUs visible, needs $gpus"

mkdir -p "$run"
[[ -w $run ]] || problem "cannot write to $run"
check_free "$run" "${MIN_FREE_GIB:-100}"
check_free /tmp "${MIN_TMP_GIB:-2}"

# The config is checked here because no requeue would mend it.
python - "$config" "$@" <<'PYTHON' || problem "python ($(command -v python)) is not ready, see above"
import sys

import deepspeed, megatron.core, torch, triton  # noqa: E401, F401

from pretrain.config import load_config

try:
    load_config(sys.argv[1], sys.argv[2:])
except (ValueError, FileNotFoundError) as error:
    sys.exit(f"config: {error}")
PYTHON

exit "$failed"

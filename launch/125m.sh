#!/bin/bash
# Longhorn 125M on 2.5B tokens on a Slurm cluster, until it is complete: across time limits, preemptions and crashes.
#
#   sbatch launch/125m.sh [key=value …] [--allow KEY] [--from-step N]      from the repository's root
#   sbatch --nodes=2 --time=12:00:00 launch/125m.sh train.seed=1             sbatch's options override the lines below
#
# First: python -m pretrain.plan launch/configs/125m.yaml --slurm launch/125m.sh
# What the job does is in launch/train_job.sh, what differs between clusters in launch/site.env.

# Slurm loses the whole log where --output's directory is missing: this one, the submit directory, is there.
#SBATCH --job-name=125m
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
# To this shell alone, 600 s before the limit: time for a step and a checkpoint.
#SBATCH --signal=B:USR1@600
#SBATCH --requeue

cd "${SLURM_SUBMIT_DIR:?submit me: sbatch launch/125m.sh}" || exit 1
CONFIG=${CONFIG:-launch/configs/125m.yaml}
# shellcheck source=launch/train_job.sh
source launch/train_job.sh

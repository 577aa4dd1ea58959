"""Train a model: `python -m pretrain.train CONFIG [key=value …]`, under torchrun for more than one process.

Resumes by itself from the newest checkpoint in run_dir. SIGUSR1 and SIGTERM save and stop.
"""

import argparse
import os
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import OmegaConf

from data_tools.files import write_durably
from pretrain.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Mesh


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.train", description=__doc__)
    parser.add_argument("config", help="a YAML file, like launch/configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="like train.seed=1 parallel.tensor=2")
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(parsed.config, parsed.overrides)
        return train(config)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(f"error (rank {os.environ.get('RANK', 0)}): {error}", file=sys.stderr)
        return 2


def train(config: Config) -> int:
    """Run to the end or to a signal; the exit code says whether the run may go on (0) or failed (1)."""
    run_dir = Path(config.run_dir)
    rank = int(os.environ.get("RANK", 0))
    if (run_dir / "DONE").exists():
        if rank == 0:
            print(f"{run_dir} is done: {run_dir / 'DONE'} exists; remove it, or set another run_dir")
        return 0
    _quiet_libraries()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    # Late: these take seconds, and wrong arguments must not.
    from pretrain.metrics import write_status
    from pretrain.parallel.mesh import init_mesh
    from pretrain.trainer import StopSignal, Trainer

    stop = StopSignal()  # first of all: Slurm signals once, and building a large model takes minutes
    with init_mesh(config.parallel.tensor) as mesh:
        if rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_durably(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
        trainer = None
        try:
            if not _kernels_work(mesh, run_dir):
                return 1
            trainer = Trainer(config, mesh, stop)
            if rank == 0:
                print(_summary(config, mesh.data_size), flush=True)
            reason = trainer.run()
        except Exception as error:
            if rank == 0:
                write_status(run_dir, "error", trainer.progress.step if trainer else 0)
            if trainer is None and isinstance(error, ValueError):
                raise  # what the user asked for does not fit, and every rank finds that out
            traceback.print_exc()
            os._exit(1)  # the others may be waiting in a collective: the launcher ends them
        if rank == 0:
            print(f"{reason}: {trainer.progress.consumed_tokens:,} tokens; everything is in {run_dir}")
    return 0


def _kernels_work(mesh: "Mesh", run_dir: Path) -> bool:
    """Test the ops before anything is spent on them; where a rank finds one wrong, all ranks say no.

    Each rank tests its own GPU: any may be broken, and all at once take as long as one. Ranks without a GPU share the
    node's processors, and its first one tests for all. What has passed before is not tested again.
    """
    from kernels import selftest
    from pretrain.metrics import write_status

    problem = None
    if mesh.device.type == "cuda" or os.environ["LOCAL_RANK"] == "0":
        try:
            selftest.require(mesh.device, say=partial(print, flush=True) if mesh.rank == 0 else lambda line: None)
        except selftest.SelfTestError as error:
            problem = str(error)
            # Now: a GPU that has failed may not let this rank meet the others.
            print(f"error (rank {mesh.rank}): {problem}", file=sys.stderr, flush=True)
            run_dir.mkdir(parents=True, exist_ok=True)
            write_status(run_dir, "error", 0)
    problems: list[str | None] = [None] * mesh.world_size
    torch.distributed.all_gather_object(problems, problem)
    if mesh.rank == 0:
        for rank, other in enumerate(problems[1:], 1):
            if other:
                print(f"error (rank {rank}): {other}", file=sys.stderr, flush=True)
    return not any(problems)


def _summary(config: Config, data_size: int) -> str:
    from longhorn_layers.model import count_parameters

    return (
        f"{count_parameters(config.model):,} parameters, {config.total_steps:,} steps of {config.tokens_per_step:,} "
        f"tokens, tensor parallel {config.parallel.tensor} × data parallel {data_size}, "
        f"ZeRO-{config.parallel.zero_stage}, {config.train.precision}, "
        f"{config.grad_accum_steps(data_size)} micro-batches of {config.train.micro_batch_size} per step"
    )


def _quiet_libraries() -> None:
    """Deprecations inside megatron-core and DeepSpeed are not the user's to mend, and would fill every rank's log."""
    for module in ("megatron", "deepspeed", "torch.distributed", "torch.jit"):
        warnings.filterwarnings("ignore", module=module)


if __name__ == "__main__":
    sys.exit(main())

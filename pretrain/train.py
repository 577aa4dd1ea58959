"""Train a model: `python -m pretrain.train CONFIG [key=value …]`, under torchrun for more than one process.

Resumes by itself from the newest checkpoint in run_dir, whatever number of processes, tensor-parallel size or ZeRO
stage wrote it. SIGUSR1, SIGTERM, Ctrl-C and a file RUN/STOP save and stop; status.json says why it ended.
"""

import argparse
import faulthandler
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from omegaconf import OmegaConf

from data_tools.files import write_durably
from data_tools.shards import ShardError
from pretrain.config import Config, ConfigError, load_config
from pretrain.lock import RunInUse, only_job
from pretrain.say import say
from pretrain.status import write_failure, write_status
from pretrain.stop import StopRequest

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Mesh
    from pretrain.trainer import Trainer


def main(arguments: list[str] | None = None) -> int:
    parsed = _parser().parse_intermixed_args(arguments)
    try:
        config = load_config(parsed.config, parsed.overrides)
        with StopRequest(Path(config.run_dir) / "STOP", parsed.stop_file) as stop:
            return train(config, stop, parsed.allow, parsed.from_step)
    except RunInUse as error:  # status.json is the other job's
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(f"error (rank {os.environ.get('RANK', 0)}): {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pretrain.train", description=__doc__)
    parser.add_argument("config", help="a YAML file, like launch/configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="like train.seed=1 parallel.tensor=2")
    allow = "resume although this key of model, optim, data or train (or all of a section) is not the checkpoint's"
    parser.add_argument("--allow", action="append", default=[], metavar="KEY", help=f"{allow}; may be repeated")
    parser.add_argument("--from-step", type=int, metavar="N", help="resume from this checkpoint; set later ones aside")
    parser.add_argument("--stop-file", type=Path, metavar="FILE", help="stop as at a signal when this file appears")
    return parser


def train(config: Config, stop: StopRequest, allowed: Sequence[str] = (), from_step: int | None = None) -> int:
    """Run to the end or to a stop; the exit code says whether all is in order (0) or it failed (1).

    Raises ValueError for what can't run; status.json has it too.
    """
    run_dir = Path(config.run_dir)
    _quiet_libraries()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    # Late: these take seconds, and wrong arguments must not.
    from pretrain.parallel.mesh import init_mesh

    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with init_mesh(config.parallel.tensor) as mesh:
            # Rank 0 looks for all: a disk shared by nodes may show them different things for a while.
            if answer := mesh.from_first(_reason_not_to(run_dir) if mesh.rank == 0 else None):
                if mesh.rank == 0:
                    print(answer)
                return 0
            with only_job(run_dir, mesh):
                if mesh.rank == 0:
                    write_durably(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
                    write_status(run_dir, "running")
                mesh.from_first(None)  # no rank's failure is overwritten by that
                return _train(config, mesh, stop, allowed, from_step)
    except ConfigError as error:  # every rank finds that out
        if os.environ.get("RANK", "0") == "0":
            write_status(run_dir, "bad_input", detail=str(error))
        raise


def _reason_not_to(run_dir: Path) -> str | None:
    advice = {"DONE": "is done; set another run_dir, or remove", "STOP": "waits; to go on, remove"}
    return next(
        (f"{run_dir} {text} {run_dir / name}" for name, text in advice.items() if (run_dir / name).exists()), None
    )


def _train(config: Config, mesh: "Mesh", stop: StopRequest, allowed: Sequence[str], from_step: int | None) -> int:
    from pretrain.checkpoint import CheckpointError
    from pretrain.trainer import Trainer, TrainingError

    run_dir = Path(config.run_dir)
    if not _kernels_work(mesh, run_dir):
        return 1
    try:
        trainer = Trainer(config, mesh, stop, allowed, from_step)
    except (ConfigError, ShardError, CheckpointError) as error:
        raise ConfigError(error) from error
    except Exception as error:
        _end_at_once(run_dir, mesh, None, "error", error)
    if mesh.rank == 0:
        for line in (_summary(config, mesh.data_size), *trainer.data.description()):
            say(line)
    try:
        reason = trainer.run()
    except CheckpointError as error:
        _end_at_once(run_dir, mesh, trainer, "checkpoint", error)
    except TrainingError as error:
        _end_at_once(run_dir, mesh, trainer, "not_finite", error)
    except Exception as error:
        _end_at_once(run_dir, mesh, trainer, "error", error)
    if mesh.rank == 0:
        say(f"{reason}: {trainer.progress.consumed_tokens:,} tokens; everything is in {run_dir}")
    return 0


def _end_at_once(run_dir: Path, mesh: "Mesh", trainer: "Trainer | None", reason: str, error: Exception) -> NoReturn:
    """Say why, and leave without a word to the other ranks, which may wait in a collective: the launcher ends them."""
    step, tokens = (trainer.progress.step, trainer.progress.consumed_tokens) if trainer else (0, 0)
    try:
        write_failure(run_dir, reason, step, tokens, f"rank {mesh.rank}: {type(error).__name__}: {error}")
        say("".join(traceback.format_exception(error)), problem=True)
    finally:
        os._exit(1)


def _kernels_work(mesh: "Mesh", run_dir: Path) -> bool:
    """Test the ops before anything is spent on them; where a rank finds one wrong, all ranks say no.

    Each rank tests its own GPU: any may be broken, and all at once take as long as one. Ranks without a GPU share the
    node's processors, and its first one tests for all. What has passed before is not tested again.
    """
    from kernels import selftest

    problem = None
    if mesh.device.type == "cuda" or os.environ["LOCAL_RANK"] == "0":
        try:
            selftest.require(mesh.device, say=say if mesh.rank == 0 else lambda line: None)
        except Exception as error:  # a broken GPU may fail in any way
            problem = str(error)
            # Now: a GPU that has failed may not let this rank meet the others.
            write_failure(run_dir, "error", 0, 0, f"rank {mesh.rank}: {problem}")
            say(f"error (rank {mesh.rank}): {problem}", problem=True)
    problems = mesh.gather_objects(problem)
    if mesh.rank == 0:
        for rank, other in enumerate(problems[1:], 1):
            if other:
                say(f"error (rank {rank}): {other}", problem=True)
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
    faulthandler.enable()  # a stack instead of nothing, where a library crashes or a mapped file is cut short
    sys.exit(main())

"""Command: what a run will take, before it takes it: memory, time, disk. Refuses what cannot run.

    python -m pretrain.plan launch/configs/1p3b.yaml nodes=4 gpus_per_node=8 parallel.tensor=2
    python -m pretrain.plan launch/configs/1p3b.yaml --slurm launch/1p3b.sh

Beside the config's keys there are the plan's own, which describe the machine: see `PlanOptions`. With
--slurm they are the script's, where not given, and what `sbatch` will do is checked and printed too.
"""

import argparse
import difflib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from longhorn_layers.config import AttentionConfig, GLAConfig, ScanMixerConfig
from pretrain.config import Config, ConfigError, config_to_dict, flattened, load_config
from pretrain.flops import flops_per_token, recomputed_flops_per_token
from pretrain.memory import GIB, MASTER_AND_MOMENTS, ParameterCounts, estimate_memory
from pretrain.plan_tables import gib, show, show_table
from pretrain.sbatch_script import SbatchScript

DESCRIPTION = "What a run will take: memory, time, disk. Refuses what cannot run."


@dataclass
class PlanOptions:
    """The machine, given as `key=value` like the config's keys; the defaults are H100s."""

    nodes: int = 1
    gpus_per_node: int = 1
    gpu_memory_gib: float = 80.0
    peak_tflops: float = 989.0  # per GPU, dense bf16
    mfu: float = 0.4  # share of the peak that the model's own FLOPs reach: assumed

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Plan:
    """A config that divides among its machine's GPUs, and its parameters."""

    config: Config
    options: PlanOptions
    counts: ParameterCounts

    @property
    def data_parallel(self) -> int:
        return self.options.gpus // self.config.parallel.tensor

    @property
    def tokens(self) -> int:
        """Trained on: whole steps, so up to a step more than total_tokens."""
        return self.config.total_steps * self.config.tokens_per_step

    @property
    def tokens_per_second(self) -> float:
        reached = self.options.gpus * self.options.peak_tflops * 1e12 * self.options.mfu
        return reached / self.flops_per_token

    @property
    def flops_per_token(self) -> float:
        return flops_per_token(self.config.model, self.config.data.seqlen)

    @property
    def recomputed_flops(self) -> float:
        """Per token, beside those."""
        checkpointing = self.config.train.activation_checkpointing
        return recomputed_flops_per_token(self.config.model, self.config.data.seqlen, checkpointing)

    @property
    def checkpoint_bytes(self) -> int:
        return MASTER_AND_MOMENTS * self.counts.total

    def memory(self) -> dict[str, int]:
        return estimate_memory(self.config, self.counts, self.data_parallel)

    def fits(self) -> bool:
        return sum(self.memory().values()) <= self.options.gpu_memory_gib * GIB


def split_overrides(overrides: Sequence[str]) -> tuple[PlanOptions, list[str]]:
    """The plan's own keys out of `key=value` overrides, and the config's, left as they are.

    Raises ConfigError for a plan key's bad value, and for a key that neither has, naming the
    nearest of both.
    """
    names = {f.name for f in fields(PlanOptions)}
    own = [o for o in overrides if _key(o) in names]
    rest = [o for o in overrides if _key(o) not in names]
    for key in map(_key, rest):
        if key.split(".")[0] not in {f.name for f in fields(Config)}:
            raise ConfigError(f"command line: unknown key {key!r}{_suggestion(key, names)}")
    return _options(own), rest


def _key(override: str) -> str:
    return override.partition("=")[0]


def _suggestion(key: str, names: set[str]) -> str:
    by_leaf = {k.split(".")[-1]: k for k in flattened(config_to_dict(Config()))}
    by_leaf |= {name: name for name in names}
    close = difflib.get_close_matches(key.split(".")[-1], by_leaf, n=1)
    if close:
        return f"; did you mean {by_leaf[close[0]]!r}?"
    return f"; the plan's own keys: {', '.join(sorted(names))}"


def _options(overrides: list[str]) -> PlanOptions:
    if unfinished := [o for o in overrides if "=" not in o]:
        raise ConfigError(f"{unfinished[0]!r}: an override is written key=value, like nodes=4")
    try:
        given = OmegaConf.from_dotlist(overrides)
        merged = OmegaConf.merge(OmegaConf.structured(PlanOptions), given)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"command line: {error.full_key}: {reason}") from None
    options = OmegaConf.to_object(merged)
    assert isinstance(options, PlanOptions)
    for name, value in vars(options).items():
        # Not `value <= 0`: a NaN is to be refused too.
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} must be above 0, got {value}")
    if options.mfu > 1:
        raise ConfigError(f"mfu is a share of the peak, at most 1; got {options.mfu}")
    return options


def check_division(config: Config, options: PlanOptions) -> None:
    """Raise ConfigError, naming every key that does not divide and the nearest values that do."""
    problems, tensor = [], config.parallel.tensor
    gpus = {f"nodes={options.nodes} × gpus_per_node={options.gpus_per_node}": options.gpus}
    valid = _tensor_sizes(config, options)
    nearest = sorted(sorted(valid, key=lambda n: abs(n - tensor))[:2])
    for what, size in (gpus | _tensor_dimensions(config)).items():
        if size % tensor:
            problems.append(
                f"parallel.tensor={tensor} does not divide {what} = {size}; "
                f"nearest that divide everything: {' or '.join(map(str, nearest))}"
            )
    if not problems:
        try:
            config.grad_accum_steps(options.gpus // tensor)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def _tensor_dimensions(config: Config) -> dict[str, int]:
    """What tensor parallelism cuts (pretrain/parallel/tensor_parallel.py)."""
    model, mixer = config.model, config.model.mixer
    dimensions = {"the padded vocabulary": model.padded_vocab_size}
    if isinstance(mixer, ScanMixerConfig):
        dimensions["d_inner = model.mixer.expand × model.d_model"] = mixer.expand * model.d_model
    if isinstance(mixer, GLAConfig):
        dimensions["model.mixer.n_head"] = mixer.n_head
    if isinstance(mixer, AttentionConfig):
        dimensions["heads = model.d_model / model.mixer.head_dim"] = model.d_model // mixer.head_dim
    if model.d_ff:
        dimensions["model.d_ff"] = model.d_ff
    return dimensions


def _tensor_sizes(config: Config, options: PlanOptions) -> list[int]:
    common = math.gcd(options.gpus, *_tensor_dimensions(config).values())
    return [n for n in range(1, common + 1) if common % n == 0]


def remedies(plan: Plan) -> list[str]:
    """The smallest sets of changes with which the plan fits, as overrides with their memory."""
    found: dict[tuple[str, ...], str] = {}
    for change in sorted(_changes(plan), key=len):
        if found and len(change) > len(min(found, key=len)):
            break  # fewer changes are enough
        changed = replace(plan, config=_changed(plan.config, change))
        if tuple(change) not in found and _divides(changed) and changed.fits():
            overrides = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
            found[tuple(change)] = f"{overrides} ({gib(sum(changed.memory().values()))})"
    return list(found.values())


def _changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Sets of overrides that may save memory, each key's mildest value first."""
    train, parallel = plan.config.train, plan.config.parallel
    tensor_sizes = _tensor_sizes(plan.config, plan.options)
    choices: dict[str, list[Any]] = {
        "train.activation_checkpointing": [] if train.activation_checkpointing else [True],
        "train.micro_batch_size": list(reversed(range(1, train.micro_batch_size))),
        "parallel.zero_stage": list(range(parallel.zero_stage + 1, 4)),
        "parallel.tensor": [n for n in tensor_sizes if n > parallel.tensor],
    }
    for values in itertools.product(*([None, *values] for values in choices.values())):
        yield {key: value for key, value in zip(choices, values, strict=True) if value is not None}


def _changed(config: Config, change: dict[str, Any]) -> Config:
    for key, value in change.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def _divides(plan: Plan) -> bool:
    train = plan.config.train
    return train.global_batch_size % (train.micro_batch_size * plan.data_parallel) == 0


def check_memory(plan: Plan) -> None:
    """Raise ConfigError, with what would help, where the estimate is beyond the GPU."""
    if plan.fits():
        return
    size, options = gib(sum(plan.memory().values())), plan.options
    helps = remedies(plan)
    advice = "what fits: " + "; or ".join(helps) if helps else "no setting fits: more GPUs, or larger ones"
    raise ConfigError(f"needs {size} on each GPU, gpu_memory_gib={options.gpu_memory_gib:g}; {advice}")


def plan_job(config_path: str, script_path: Path, given: Sequence[str], console: Console) -> None:
    """Plan a run on what its sbatch script asks for; print that, and what `sbatch` will do.

    Raises ConfigError with everything that is in its way.
    """
    # Late: it reads shards, which takes seconds to import.
    from pretrain import plan_slurm

    script = SbatchScript.read(script_path)
    machine = {"nodes": script.nodes, "gpus_per_node": script.gpus_per_node}
    asked = [f"{key}={count}" for key, count in machine.items() if count]
    options, overrides = split_overrides([*asked, *given])
    run_dir = plan_slurm.job_run_dir(config_path, overrides)
    config = load_config(config_path, [*overrides, f"run_dir={run_dir}"])
    plan = Plan(config, options, ParameterCounts.of(config.model))
    job = plan_slurm.Job(plan, script, config_path, tuple(overrides))
    problems = [f"{script_path}: {problem}" for problem in plan_slurm.script_problems(script, config_path)]
    problems += [f"{script_path}: {problem}" for problem in plan_slurm.signal_problems(job)]
    problems += plan_slurm.shard_problems(config)
    problems += [*plan_slurm.disk_problems(job), *plan_slurm.run_problems(job)]
    try:
        check_division(config, options)
        show(plan, console)
        check_memory(plan)
    except ValueError as error:
        problems.append(str(error))
    show_table(f"sbatch {script_path}", plan_slurm.rows(job), console, justify="left")
    if problems:
        raise ConfigError("".join(f"\n- {problem}" for problem in problems))


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with the reason on stderr where the run can't be."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.plan", description=DESCRIPTION)
    parser.add_argument("config", help="YAML file, like launch/configs/1p3b.yaml")
    own = ", ".join(f"{f.name}={f.default}" for f in fields(PlanOptions))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"the config's keys, or: {own}")
    parser.add_argument("--slurm", type=Path, metavar="SCRIPT", help="also what `sbatch SCRIPT` will do")
    # Options may come between the overrides.
    parsed = parser.parse_intermixed_args(arguments)
    try:
        if parsed.slurm:
            plan_job(parsed.config, parsed.slurm, parsed.overrides, Console())
            return 0
        options, overrides = split_overrides(parsed.overrides)
        config = load_config(parsed.config, overrides)
        check_division(config, options)
        plan = Plan(config, options, ParameterCounts.of(config.model))
        show(plan, Console())
        check_memory(plan)
    except (ValueError, FileNotFoundError) as error:  # ConfigError is a ValueError
        print(f"plan: refused: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Command: a training step on one device: the largest micro-batch, tokens per second, MFU, and where the time goes.

    python -m pretrain.benchmarks.step launch/configs/1p3b.yaml [key=value ...]

The config's model on random tokens, in each precision with and without activation checkpointing. A step is one
micro-batch, forward and backward, clipping and AdamW: a run that accumulates micro-batches spreads its optimizer over
more tokens. MFU counts what the model needs, 6·N and what its mixer does (pretrain/flops.py), and nothing that is
recomputed.
"""

import argparse
import gc
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels.benchmarks.record import hardware_slug, provenance, write_json
from kernels.benchmarks.timing import Lap, Stopwatch, Times
from longhorn_layers.model import LanguageModel
from pretrain.benchmarks import RESULTS
from pretrain.benchmarks.profile import MATMUL, Breakdown, profile_kernels
from pretrain.config import Config, ConfigError, load_config
from pretrain.flops import flops_per_token, matmul_flops_per_token, matmul_parameters_per_layer
from pretrain.metrics import peak_tflops
from pretrain.optim import build_optimizer, cast_matrices

Step = Callable[[Tensor, Tensor, Lap], None]  # (input_ids, targets), both (batch, seqlen), then told of its phases
WARMUP, PROFILED = 2, 2


class TorchStep:
    """Plain torch: what ZeRO-1 comes to on one device. Precisions as in pretrain/parallel/zero.py."""

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.train.seed)
        with device:
            self.model = LanguageModel(config.model)
        self.model.activation_checkpointing = config.train.activation_checkpointing
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.train.precision != "fp32")
        self.clip = config.optim.clip
        self.optimizer = build_optimizer(self.model, config.optim)
        # With bf16 matrices AdamW updates fp32 masters of them, which they follow.
        self.masters: dict[Tensor, Tensor] = {}
        if config.train.precision == "bf16":
            self.masters = {p: p.detach().clone() for p in self.model.parameters() if p.dim() >= 2}
            for group in self.optimizer.param_groups:
                group["params"] = [self.masters.get(p, p) for p in group["params"]]
            cast_matrices(self.model, torch.bfloat16)

    def __call__(self, input_ids: Tensor, targets: Tensor, lap: Lap) -> None:
        with self.autocast():
            loss = self.model(input_ids, targets) / targets.numel()
        lap("forward")
        loss.backward()
        lap("backward")
        for parameter, master in self.masters.items():
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for parameter, master in self.masters.items():
                parameter.copy_(master)
        lap("optimizer")


class ZeroStep:
    """The trainer's own engine, on a mesh of this process alone; needs deepspeed and megatron-core."""

    def __init__(self, config: Config, mesh: Any) -> None:
        from pretrain.parallel.zero import ZeroEngine  # late: not every machine has deepspeed
        from pretrain.trainer import build_model

        config = replace(config, train=replace(config.train, global_batch_size=1, micro_batch_size=1))
        self.engine, self.rate = ZeroEngine(build_model(config, mesh), config, mesh), config.optim.lr

    def __call__(self, input_ids: Tensor, targets: Tensor, lap: Lap) -> None:
        self.engine.forward_backward({"input_ids": input_ids, "targets": targets}, targets.numel())
        lap("forward and backward")
        self.engine.step(self.rate)
        lap("optimizer")


@contextmanager
def step_builder(engine: str, device: torch.device) -> Iterator[Callable[[Config], Step]]:
    """How steps of this engine are made."""
    if engine == "torch":
        yield partial(TorchStep, device=device)
        return
    from pretrain.parallel.mesh import init_mesh

    with init_mesh(tensor=1) as mesh:
        yield partial(ZeroStep, mesh=mesh)


@dataclass(frozen=True)
class Run:
    """One precision, with or without checkpointing, at its largest micro-batch."""

    config: Config  # its train.micro_batch_size is the one that ran
    times: Times
    peak_memory: int | None  # bytes, of a GPU
    breakdown: Breakdown
    peak: float | None  # TFLOP/s

    @property
    def tokens(self) -> int:
        return self.config.train.micro_batch_size * self.config.data.seqlen

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.times.median * 1e3

    @property
    def mfu(self) -> float | None:
        return None if self.peak is None else self._ideal_ms(self._needed_flops) / self.times.median

    def bounds(self) -> dict[str, float] | None:
        """How far matmuls carry: their utilisation, and the MFU that they alone allow.

        "matmuls_at_peak": were they as fast as the device can, and all else as measured. "matmuls_alone": were all
        else free, and they as measured. None where the device's peak is not known.
        """
        matmul = self.breakdown.milliseconds.get(MATMUL, 0.0)
        if self.peak is None or not matmul:
            return None
        model = self.config.model
        done = matmul_flops_per_token(model)
        if self.config.train.activation_checkpointing:
            done += 2.0 * model.n_layer * matmul_parameters_per_layer(model)
        ideal, needed = self._ideal_ms(done), self._ideal_ms(self._needed_flops)
        return {
            "matmul_share_of_step": matmul / self.times.median,
            "matmul_utilisation": ideal / matmul,
            "mfu_with_matmuls_at_peak": needed / (self.times.median - matmul + ideal),
            "mfu_with_matmuls_alone": needed / matmul,
        }

    @property
    def _needed_flops(self) -> float:
        return flops_per_token(self.config.model, self.config.data.seqlen)

    def _ideal_ms(self, flops_per_token: float) -> float:
        assert self.peak is not None
        return self.tokens * flops_per_token / (self.peak * 1e9)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        train, bounds = self.config.train, self.bounds()
        return {
            "precision": train.precision,
            "activation_checkpointing": train.activation_checkpointing,
            "micro_batch_size": train.micro_batch_size,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "mfu": None if self.mfu is None else round(self.mfu, 4),
            "peak_memory_bytes": self.peak_memory,
            **self.times.to_dict(),
            "profile": self.breakdown.to_dict(),
            "bounds": None if bounds is None else {name: round(value, 4) for name, value in bounds.items()},
        }


def largest(fits: Callable[[int], bool]) -> int:
    """The largest n from 1 on with fits(n), given that whatever is less than one that fits does too; 0: none."""
    good, bad = 0, 1
    while fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def fits(step: Step, config: Config, device: torch.device, micro_batch_size: int) -> bool:
    """Whether a GPU has room for this micro-batch, and the allocator need not hand memory back and ask anew."""
    gc.collect()
    torch.cuda.empty_cache()
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    try:
        step(*random_batch(config, micro_batch_size, device), lambda phase: None)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0) == retries


def random_batch(config: Config, micro_batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and targets, (micro_batch_size, seqlen) each."""
    shape = (micro_batch_size, config.data.seqlen + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(config.train.seed))
    ids = ids.to(device)
    return ids[:, :-1], ids[:, 1:]


def measure(build: Callable[[Config], Step], config: Config, steps: int, device: torch.device) -> Run:
    """Time and profile this config's step at its largest micro-batch on a GPU, else at the config's.

    Raises ConfigError where not even one row fits.
    """
    gc.collect()  # the last config's model
    step, size = build(config), config.train.micro_batch_size
    if device.type == "cuda":
        size = largest(partial(fits, step, config, device))
        if size == 0:
            raise ConfigError(f"data.seqlen={config.data.seqlen}: not one row of the model fits in the GPU's memory")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    batch = random_batch(config, size, device)
    for _ in range(WARMUP):
        step(*batch, lambda phase: None)
    watch = Stopwatch(device)
    for _ in range(steps):
        step(*batch, watch.lap)
    times = Times.of(watch.read())
    peak_memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    kernels = profile_kernels(lambda: step(*batch, lambda phase: None), PROFILED, device)
    return Run(
        replace(config, train=replace(config.train, micro_batch_size=size)),
        times,
        peak_memory,
        Breakdown.of(kernels, PROFILED, times.median),
        peak_tflops(config.log.peak_tflops),
    )


def show(runs: Sequence[Run], console: Console) -> None:
    """Print every run's speed, and where the fastest one's time goes."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("precision", "recompute", "batch", "tokens/s", "MFU", "step, ms", "GiB"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for run in runs:
        train = run.config.train
        table.add_row(
            train.precision,
            "yes" if train.activation_checkpointing else "no",
            str(train.micro_batch_size),
            f"{run.tokens_per_second:,.0f}",
            "n/a" if run.mfu is None else f"{run.mfu:.1%}",
            f"{run.times.median:.1f}",
            "" if run.peak_memory is None else f"{run.peak_memory / 2**30:.1f}",
        )
    console.print(table, highlight=False)
    console.print("recompute: activation checkpointing; batch: rows of a micro-batch", highlight=False)
    show_profile(max(runs, key=lambda run: run.tokens_per_second), console)


def show_profile(run: Run, console: Console) -> None:
    """Print a step's groups of kernels, and what they leave possible."""
    train = run.config.train
    checkpointing = "with" if train.activation_checkpointing else "without"
    console.print(f"the fastest, {train.precision} {checkpointing} checkpointing, profiled:", highlight=False)
    table = Table(box=SIMPLE_HEAD)
    for column in ("part", "ms", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for group, milliseconds in run.breakdown.milliseconds.items():
        table.add_row(group, f"{milliseconds:.2f}", f"{milliseconds / run.times.median:.1%}")
    console.print(table, highlight=False)
    console.print(f"largest: {', '.join(list(run.breakdown.milliseconds)[:3])}", highlight=False)
    if bounds := run.bounds():
        console.print(
            "matmuls take {matmul_share_of_step:.1%} of the step, at {matmul_utilisation:.1%} of the peak; MFU is at "
            "most {mfu_with_matmuls_at_peak:.1%} with them at the peak and all else as it is, "
            "{mfu_with_matmuls_alone:.1%} with them as they are and all else free".format(**bounds),
            highlight=False,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 2 for a config or arguments that don't fit."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU here")
    runs: list[Run] = []
    path = options.output / f"step-{options.engine}-{hardware_slug(device)}.json"
    try:
        config = load_config(options.config, options.overrides)
        settings = {"config": options.config, "overrides": options.overrides, "engine": options.engine}
        needed = flops_per_token(config.model, config.data.seqlen)
        record = {**provenance(device, "deepspeed"), **settings, "flops_per_token": needed}
        with step_builder(options.engine, device) as build:
            for precision, checkpointing in itertools.product(options.precisions, (False, True)):
                train = replace(config.train, precision=precision, activation_checkpointing=checkpointing)
                runs.append(measure(build, replace(config, train=train), options.steps, device))
                # After each: what is measured is kept, whatever becomes of the next.
                results = [run.to_dict() for run in runs]
                write_json(path, {**record, "peak_tflops": runs[0].peak, "results": results})
    except (ConfigError, FileNotFoundError) as error:
        print(f"step: {error}", file=sys.stderr)
        return 2
    console = Console()
    show(runs, console)
    console.print(f"recorded in {path}", highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.benchmarks.step", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("config", help="like launch/configs/1p3b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    parser.add_argument(
        "--device", default="cuda", help="cuda (the default) or cpu, where micro-batches are the config's"
    )
    parser.add_argument(
        "--engine", choices=("torch", "zero"), default="torch", help="zero: the trainer's, on DeepSpeed"
    )
    parser.add_argument("--precisions", nargs="+", choices=("autocast", "bf16", "fp32"), default=["autocast", "bf16"])
    parser.add_argument("--steps", type=int, default=10, help="timed (default: 10)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())

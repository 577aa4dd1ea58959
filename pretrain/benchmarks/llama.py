"""Command: training speed of a config's model against transformers' Llama of the same number of parameters.

    python -m pretrain.benchmarks.llama launch/configs/demo.yaml --contexts 512 4096

Both train in fp32 in one process, forward, backward and AdamW, on the same tokens, a step each in turn. Llama
has half the layers at the same width (the paper's sizes: Longhorn has twice the transformer's layers), heads
of 64 and torch's fused attention; the width of its MLP makes the parameters equal.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from data_tools.dataset import is_dataset, open_dataset
from data_tools.shards import ShardPaths
from kernels.benchmarks.record import hardware_slug, provenance, write_json
from kernels.benchmarks.timing import Lap, Times, take_turns
from longhorn_layers.config import ModelConfig
from longhorn_layers.model import LanguageModel, count_parameters
from pretrain.benchmarks import RESULTS
from pretrain.config import Config, ConfigError, load_config
from pretrain.data import token_stream, windows
from pretrain.optim import build_optimizer

OURS, PEER = "Longhorn", "Llama"
TARGETS = {512: 1.0, 4096: 2.0}  # context → our tokens per second over Llama's
HEAD_DIM = 64
MLP_MULTIPLE = 16  # a width that Llama's matmuls like
PARAMETER_TOLERANCE = 0.01
TRIAL_STEPS = 5
CPU = torch.device("cpu")

Batches = Iterator[tuple[Tensor, Tensor]]  # (input_ids, targets), both (batch, context) int64


class NotTraining(RuntimeError):
    """A model whose loss does not fall has no training speed."""


@dataclass(frozen=True)
class Contender:
    """A model, and how its mean loss over (input_ids, targets) is asked for."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """Both models at one context, in steps of `batch` rows."""

    context: int
    batch: int
    parameters: dict[str, int]
    losses: dict[str, tuple[float, float]]  # of one batch, before and after a few steps on it
    times: dict[str, Times]

    def tokens_per_second(self, name: str) -> float:
        return self.batch * self.context / self.times[name].median * 1e3

    @property
    def ratio(self) -> float:
        return self.tokens_per_second(OURS) / self.tokens_per_second(PEER)

    @property
    def target(self) -> float | None:
        return TARGETS.get(self.context)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        models = {
            name: {
                "parameters": self.parameters[name],
                "tokens_per_second": round(self.tokens_per_second(name), 1),
                "loss_before_and_after_trial": self.losses[name],
                **times.to_dict(),
            }
            for name, times in self.times.items()
        }
        shape = {"context": self.context, "batch": self.batch}
        return {**shape, "ratio": round(self.ratio, 3), "target": self.target, "models": models}


def llama_of_equal_size(config: ModelConfig, max_context: int) -> LlamaConfig:
    """Llama's config with `config`'s width, half its layers, and as many parameters to within 1%.

    Raises ConfigError where no MLP makes that so, or where heads of 64 don't divide the width.
    """
    if config.d_model % HEAD_DIM:
        raise ConfigError(f"model.d_model={config.d_model} is no multiple of Llama's head size {HEAD_DIM}")

    def with_mlp(width: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.d_model,
            intermediate_size=width,
            num_hidden_layers=max(1, config.n_layer // 2),
            num_attention_heads=config.d_model // HEAD_DIM,
            max_position_embeddings=max_context,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            use_cache=False,
            attn_implementation="sdpa",  # type: ignore[call-arg]  # taken by its base class
        )

    def count(width: int) -> int:
        with torch.device("meta"):
            return _count(LlamaForCausalLM(with_mlp(width)))

    wanted, smallest = count_parameters(config), count(MLP_MULTIPLE)
    per_multiple = count(2 * MLP_MULTIPLE) - smallest
    width = MLP_MULTIPLE * max(1, 1 + round((wanted - smallest) / per_multiple))
    if abs(count(width) / wanted - 1) > PARAMETER_TOLERANCE:
        raise ConfigError(
            f"no Llama of width {config.d_model} has the model's {wanted:,} parameters within "
            f"{PARAMETER_TOLERANCE:.0%}: the nearest has {count(width):,}; take another model.n_layer"
        )
    return with_mlp(width)


def contenders(config: ModelConfig, max_context: int) -> dict[str, Contender]:
    """Both models, freshly initialised."""
    longhorn = LanguageModel(config)
    llama = LlamaForCausalLM(llama_of_equal_size(config, max_context))

    def longhorn_loss(input_ids: Tensor, targets: Tensor) -> Tensor:
        return longhorn(input_ids, targets) / targets.numel()

    def llama_loss(input_ids: Tensor, targets: Tensor) -> Tensor:
        return llama(input_ids=input_ids, labels=targets, shift_labels=targets).loss

    return {OURS: Contender(longhorn, longhorn_loss), PEER: Contender(llama, llama_loss)}


def batches(config: Config, context: int, batch: int) -> Batches:
    """(input_ids, targets) without end: the config's shard over and over; random ids where it has none."""
    if not has_shard(config):
        generator = torch.Generator().manual_seed(config.train.seed)
        while True:
            ids = torch.randint(config.model.vocab_size, (batch, context + 1), generator=generator)
            yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # as a shard's windows are: transformers views them
    stream = token_stream(open_dataset(config.data.train))
    count = (len(stream) - 1) // context // batch
    if count == 0:
        raise ConfigError(f"data.train={config.data.train} has no {batch} windows of {context} tokens")
    while True:
        for i in range(count):
            yield windows(stream, context, range(i * batch, (i + 1) * batch))


def has_shard(config: Config) -> bool:
    """Whether the config's training shard is on disk."""
    train = config.data.train
    return bool(train) and (is_dataset(train) or ShardPaths.of(train).manifest.is_file())


def compare(config: Config, context: int, tokens: int, steps: int) -> Comparison:
    """Train both models for `steps` timed steps of `tokens` tokens (in any case one row) at this context.

    Raises NotTraining where a few untimed steps on one batch do not lower a model's loss.
    """
    torch.manual_seed(config.train.seed)
    batch = max(1, tokens // context)
    models = contenders(config.model, context)
    losses = {
        name: _try_training(name, model, config, next(batches(config, context, batch)))
        for name, model in models.items()
    }
    runs = {name: _train_step(model, config, batches(config, context, batch)) for name, model in models.items()}
    parameters = {name: _count(model.model) for name, model in models.items()}
    return Comparison(context, batch, parameters, losses, take_turns(runs, steps, CPU))


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _try_training(name: str, contender: Contender, config: Config, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
    step = _train_step(contender, config, iter([batch] * TRIAL_STEPS))
    with torch.no_grad():
        before = contender.loss(*batch).item()
    for _ in range(TRIAL_STEPS):
        step(lambda phase: None)
    with torch.no_grad():
        after = contender.loss(*batch).item()
    if not after < before:  # so written that NaN fails
        raise NotTraining(f"{name}: a batch's loss went from {before:.3f} to {after:.3f}; nothing is timed")
    return round(before, 4), round(after, 4)


def _train_step(contender: Contender, config: Config, data: Batches) -> Callable[[Lap], None]:
    # At the schedule's last rate: the first is for after a warm-up.
    optimizer = build_optimizer(contender.model, replace(config.optim, lr=config.optim.min_lr))

    def run(lap: Lap) -> None:
        loss = contender.loss(*next(data))
        lap("forward")
        loss.backward()
        lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")

    return run


def show(comparisons: Sequence[Comparison], console: Console) -> None:
    """Print tokens per second, the step's phases in ms, and by context the ratio with its target."""
    counts = ", ".join(f"{name}: {count:,} parameters" for name, count in comparisons[0].parameters.items())
    console.print(counts, highlight=False)
    table = Table(box=SIMPLE_HEAD)
    for column in ("context", "model", "tokens/s", "forward", "backward", "AdamW", "ratio", "target"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for comparison in comparisons:
        target = "" if comparison.target is None else f"≥ {comparison.target:g}×"
        for name, times in comparison.times.items():
            own = name == OURS
            phases = (f"{statistics.median(laps):.1f}" for laps in times.phases.values())
            table.add_row(
                str(comparison.context) if own else "",
                name,
                f"{comparison.tokens_per_second(name):,.0f}",
                *phases,
                *((f"{comparison.ratio:.2f}×", target) if own else ("", "")),
            )
    console.print(table, highlight=False)
    console.print("forward, backward and AdamW: medians in ms", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a model does not train; 2 for a config or arguments that don't fit."""
    options = _parser().parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        config = load_config(options.config)
        record = provenance(CPU, "transformers")
        comparisons = [compare(config, context, options.tokens_per_step, options.steps) for context in options.contexts]
    except (NotTraining, ConfigError, FileNotFoundError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1 if isinstance(error, NotTraining) else 2
    finally:
        torch.set_num_threads(threads)
    console = Console()
    show(comparisons, console)
    settings = {
        "config": options.config,
        "data": config.data.train if has_shard(config) else "random ids",
        "dtype": "float32",
        "threads": options.threads,
        "steps": options.steps,
    }
    path = options.output / f"training-{hardware_slug(CPU)}.json"
    write_json(path, {**record, **settings, "results": [c.to_dict() for c in comparisons]})
    console.print(f"recorded in {path}", highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.benchmarks.llama", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("config", nargs="?", default="launch/configs/demo.yaml", help="default: %(default)s")
    parser.add_argument("--contexts", nargs="+", type=_positive, default=sorted(TARGETS), metavar="TOKENS")
    parser.add_argument("--tokens-per-step", type=_positive, default=2048, help="in any case one context")
    parser.add_argument("--steps", type=_positive, default=10, help="timed, of each model (default: 10)")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

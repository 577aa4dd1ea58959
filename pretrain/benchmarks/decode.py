"""Command: tokens per second of decoding, from the first token to the 32768th.

    python -m pretrain.benchmarks.decode launch/configs/1p3b.yaml [key=value ...]

The config's model with bf16 matrices and random weights takes the likeliest token again and again. On a GPU one step is
captured in a CUDA graph and replayed: the state is a part of the graph's memory and grows with no token.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels.benchmarks.record import hardware_slug, provenance, write_json
from kernels.benchmarks.timing import Stopwatch, copy_rate
from longhorn_layers.model import DecodeState, LanguageModel
from pretrain.benchmarks import RESULTS
from pretrain.config import Config, ConfigError, load_config
from pretrain.optim import cast_matrices

CHECKED_TOKENS = 16
TOLERANCE = 0.05  # of the largest logit: bf16 matmuls of one token and of many round differently
WARMUP = 3


class WrongLogits(RuntimeError):
    """Decoding does not compute what the model computes of the whole text."""


class Decoder:
    """Greedy decoding of `batch` texts at once; a call is one token of each."""

    def __init__(self, model: LanguageModel, batch: int) -> None:
        self.model, self.device = model, model.embedding.weight.device
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.state = model.new_state(batch)
        self.logits = self._forward(self.ids, self.state)
        self.step: Callable[[], None] = self._step
        if self.device.type == "cuda":
            self.step = self._captured()
        self.restart()

    @torch.no_grad()
    def _forward(self, ids: Tensor, state: DecodeState | None = None) -> Tensor:
        # The cache of cast weights would keep a graph's memory; matrices are in bf16 as they are.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            return self.model(ids, state=state)[:, -1]

    def _step(self) -> None:
        self.logits.copy_(self._forward(self.ids, self.state))
        self.ids.copy_(self.logits.argmax(-1, keepdim=True))

    def _captured(self) -> Callable[[], None]:
        side = torch.cuda.Stream()  # what is captured must have run before, on a stream of its own
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def restart(self) -> None:
        """Before the first token of every text; they start with different ones."""
        self.ids.copy_(torch.arange(len(self.ids), device=self.device).remainder(self.model.config.vocab_size)[:, None])
        for tensor in self.state_tensors:
            tensor.zero_()

    @property
    def state_tensors(self) -> list[Tensor]:
        return [tensor for layer in self.state.layers for tensor in vars(layer).values()]

    def check(self) -> float:
        """The largest difference, of the largest logit, from the model's logits of the same tokens at once.

        Raises WrongLogits where it is more than bf16 explains.
        """
        self.restart()
        vocab_size = self.model.config.vocab_size  # the logits of the padding beyond it are -inf
        generator = torch.Generator().manual_seed(0)
        texts = torch.randint(vocab_size, (len(self.ids), CHECKED_TOKENS), generator=generator).to(self.device)
        for ids in texts.split(1, dim=1):
            self.ids.copy_(ids)
            self.step()
        got, whole = self.logits[:, :vocab_size], self._forward(texts)[:, :vocab_size]
        error = ((got - whole).abs().max() / whole.abs().max()).item()
        if not error <= TOLERANCE:  # so written that NaN fails
            raise WrongLogits(f"logits after {CHECKED_TOKENS} tokens are off by {error:.1e}, {TOLERANCE} is allowed")
        return error


@dataclass(frozen=True)
class Speed:
    """Of a batch: milliseconds a token where the text has grown to a position, from 1 on."""

    batch: int
    milliseconds: dict[int, float]
    bytes_per_token: int  # weights read, state read and written
    error: float  # of the logits, before timing

    def tokens_per_second(self, position: int) -> float:
        return self.batch / self.milliseconds[position] * 1e3

    def to_dict(self, copied: float | None) -> dict[str, Any]:
        """For JSON. copied: bytes a second of a copy."""
        return {
            "batch": self.batch,
            "tokens_per_second_at": {p: round(self.tokens_per_second(p), 1) for p in self.milliseconds},
            "ms_per_token_at": {position: round(ms, 4) for position, ms in self.milliseconds.items()},
            "bytes_per_token": self.bytes_per_token,
            "ms_per_token_at_copy_rate": None if copied is None else round(self.bytes_per_token / copied * 1e3, 4),
            "max_relative_error": float(f"{self.error:.2g}"),
        }


def build_model(config: Config, device: torch.device) -> LanguageModel:
    """The config's model, fresh, its matrices in bf16."""
    torch.manual_seed(config.train.seed)
    with device:
        model = LanguageModel(config.model)
    cast_matrices(model, torch.bfloat16)
    return model


def measure(model: LanguageModel, batch: int, positions: Sequence[int], window: int) -> Speed:
    """Decode to the last position; of the `window` tokens that begin at each, the median time of one.

    Raises WrongLogits, before anything is timed.
    """
    decoder = Decoder(model, batch)
    error = decoder.check()
    decoder.restart()
    token, milliseconds = 1, {}
    for position in positions:
        while token < position:
            decoder.step()
            token += 1
        watch = Stopwatch(decoder.device)
        for _ in range(window):
            decoder.step()
            watch.lap("token")
            token += 1
        milliseconds[position] = statistics.median(ms for _, ms in watch.read())
    weights = sum(p.nbytes for p in model.parameters())
    return Speed(batch, milliseconds, weights + 2 * sum(t.nbytes for t in decoder.state_tensors), error)


def show(speeds: Sequence[Speed], copied: float | None, console: Console) -> None:
    """Print tokens per second by batch and position."""
    table = Table("batch", box=SIMPLE_HEAD)
    for position in speeds[0].milliseconds:
        table.add_column(f"token {position}", justify="right")
    table.add_column("last / first", justify="right")
    table.add_column("at copy rate", justify="right")
    for speed in speeds:
        rates = [speed.tokens_per_second(position) for position in speed.milliseconds]
        floor = "" if copied is None else f"{speed.batch * copied / speed.bytes_per_token:,.0f}"
        table.add_row(str(speed.batch), *(f"{rate:,.0f}" for rate in rates), f"{rates[-1] / rates[0]:.3f}", floor)
    console.print(table, highlight=False)
    console.print("tokens per second, all texts of the batch together", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 for wrong logits; 2 for a config or arguments that don't fit."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU here")
    positions = sorted(options.positions)
    if any(b - a < options.window for a, b in zip(positions, positions[1:], strict=False)):
        parser.error(f"--positions {positions}: --window {options.window} tokens of one would run into the next")
    try:
        record = provenance(device)
        copied = copy_rate(device) if device.type == "cuda" else None
        config = load_config(options.config, options.overrides)
        model = build_model(config, device)
        speeds = [measure(model, batch, positions, options.window) for batch in options.batches]
    except (WrongLogits, ConfigError, FileNotFoundError) as error:
        print(f"decode: {error}", file=sys.stderr)
        return 1 if isinstance(error, WrongLogits) else 2
    console = Console()
    show(speeds, copied, console)
    settings = {"config": options.config, "overrides": options.overrides, "window": options.window}
    results = {"copy_bytes_per_second": copied, "results": [speed.to_dict(copied) for speed in speeds]}
    path = options.output / f"decode-{hardware_slug(device)}.json"
    write_json(path, {**record, **settings, **results})
    console.print(f"recorded in {path}", highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.benchmarks.decode", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("config", help="like launch/configs/1p3b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    parser.add_argument("--device", default="cuda", help="cuda (the default), or cpu, where no graph is captured")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], metavar="TEXTS")
    parser.add_argument("--positions", nargs="+", type=int, default=[1, 2048, 32768], metavar="TOKEN")
    parser.add_argument("--window", type=int, default=64, help="tokens timed from each position on (default: 64)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""What a comparison is made of: variants of one op on one shape, and the bars that they have to clear."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.benchmarks.timing import Times, speedup

Shape = Mapping[str, int]
Op = Callable[..., Any]  # a case's inputs by name → its output, a Tensor or a tuple of them
# Relative to each tensor's largest value. bf16 allows for two roundings: of logits, and of what is made of them.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Variant:
    """One way to compute a case's output; `oracle`, given the same inputs in float64, says what is right."""

    op: Op
    oracle: Op
    dtype: torch.dtype = torch.float32  # of all that has more than one dimension but `Case.wide`; vectors stay fp32
    threads: int = 1
    shape: Shape | None = None  # None: the case's; else the same work in another shape
    backward: bool = True  # False: the forward alone is checked and timed, without gradients
    time_adjacent: bool = False  # (batch, seqlen, channels) inputs lie with their tokens side by side, not channels
    needs: str | None = None  # a package that is not among the requirements; without it the variant is skipped


@dataclass(frozen=True)
class Bar:
    """`faster` has to be at least `ratio` times as fast as `slower`, by their medians."""

    faster: str
    slower: str
    ratio: float
    hardware: str = ""  # part of the name of the hardware that it holds for: of any

    @property
    def variants(self) -> tuple[str, ...]:
        return self.faster, self.slower

    def measure(self, times: Mapping[str, Times]) -> float:
        return speedup(times[self.faster], times[self.slower])

    def is_met(self, measured: float) -> bool:
        return measured >= self.ratio

    def describe(self, measured: float) -> str:
        return f"{self.faster} is {measured:.2f}× as fast as {self.slower} (≥ {self.ratio:.3g}×)"


@dataclass(frozen=True)
class Limit:
    """`phase` of `variant` may take at most so many milliseconds, by its median, on the hardware named."""

    variant: str
    phase: str
    milliseconds: float
    hardware: str

    @property
    def variants(self) -> tuple[str, ...]:
        return (self.variant,)

    def measure(self, times: Mapping[str, Times]) -> float:
        return times[self.variant].only(self.phase).median

    def is_met(self, measured: float) -> bool:
        return measured <= self.milliseconds

    def describe(self, measured: float) -> str:
        return f"{self.variant}: {self.phase} takes {measured:.3f} ms (≤ {self.milliseconds:g} ms on {self.hardware})"


@dataclass(frozen=True)
class Case:
    """`draw(shape, generator)` makes inputs by name: fp32 (int64 targets) on the generator's device."""

    summary: str
    draw: Callable[[Shape, torch.Generator], dict[str, Tensor]]
    shape: Shape
    check_shape: Shape  # small, and no multiple of any vector or chunk
    variants: Mapping[str, Variant]
    baseline: str
    bars: tuple[Bar | Limit, ...] = ()
    wide: tuple[str, ...] = ()  # inputs that are fp32 whatever a variant's dtype
    in_place: tuple[str, ...] = ()  # inputs that the op updates: results too


def normal(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, Tensor]:
    """A standard normal tensor of each shape."""
    return {name: torch.randn(shape, generator=generator, device=generator.device) for name, shape in shapes.items()}

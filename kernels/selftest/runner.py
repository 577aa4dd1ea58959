"""One case on one backend, against the same numbers in float64 on the CPU.

The oracle runs on the CPU wherever the op runs: a GPU that computes wrongly cannot vouch for itself.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kernels.selftest.cases import ALLOWED, Case, Shape


@dataclass(frozen=True)
class Deviation:
    """How far a result or gradient is off, and may be, of its largest value."""

    tensor: str
    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """Above 1: wrong, and NaN is infinitely so."""
        return math.inf if math.isnan(self.error) else self.error / self.allowed


@dataclass(frozen=True)
class Outcome:
    """The worst tensor of a case, or what the op raised."""

    case: Case
    shape: Shape
    seconds: float
    worst: Deviation | None
    raised: Exception | None = None

    @property
    def passed(self) -> bool:
        return self.worst is not None and self.worst.ratio <= 1

    @property
    def dtype_name(self) -> str:
        return {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.case.dtype]

    @property
    def shape_text(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.shape.items())

    @property
    def problem(self) -> str:
        """What is wrong where, and by how much."""
        where = f"{self.case.op} ({self.case.name}, {self.dtype_name}, {self.shape_text})"
        if self.worst is None:
            return f"{where} raised {type(self.raised).__name__}: {self.raised}"
        return (
            f"{where} is wrong: {self.worst.tensor} is off by {self.worst.error:.1e} of its largest value, "
            f"{self.worst.allowed:.1e} is allowed"
        )


def is_interpreted(backend: str, device: torch.device) -> bool:
    return backend == "triton" and device.type == "cpu"


def check(case: Case, backend: str, device: torch.device) -> Outcome:
    """Whatever goes wrong in the op is an outcome, not an exception."""
    started = time.perf_counter()
    shape = (case.interpreted if is_interpreted(backend, device) else None) or case.shape
    worst, raised = None, None
    try:
        worst = max(_deviations(case, backend, device, shape), key=lambda deviation: deviation.ratio)
    except Exception as exception:
        raised = exception
    return Outcome(case, shape, time.perf_counter() - started, worst, raised)


def _deviations(case: Case, backend: str, device: torch.device, shape: Shape) -> list[Deviation]:
    inputs = case.draw(Generator().manual_seed(0), case.dtype, *shape.values())
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    want = _results_and_gradients(case, "reference", wide)
    with _whole_matmuls():
        got = _results_and_gradients(case, backend, {name: _placed(t, device) for name, t in inputs.items()})
    return [Deviation(name, _error(t, want[name]), case.tolerance or ALLOWED[t.dtype]) for name, t in got.items()]


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that lies there with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


@contextmanager
def _whole_matmuls() -> Iterator[None]:
    """fp32 matmuls in fp32: NVIDIA's containers let them round to TF32, which is no fault of an op."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.enable_grad()
def _results_and_gradients(case: Case, backend: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not case.differentiable:
        return case.run(backend, **inputs)
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if t.is_floating_point()}
    results = case.run(backend, **inputs)
    generator = Generator().manual_seed(1)
    # Rounded to bf16, so that every dtype is handed the same numbers.
    weights = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in results.values()]
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), weights)
    named = zip((f"gradient of {name}" for name in leaves), gradients, strict=True)
    return {name: t.detach() for name, t in results.items()} | dict(named)


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        raise ValueError(f"a result has shape {tuple(got.shape)} and not {tuple(want.shape)}")
    scale = want.abs().max().item()
    error = (got.cpu().double() - want).abs().max().item()
    return error / scale if scale else error

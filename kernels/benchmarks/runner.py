"""Check, then time: a variant whose numbers are wrong has no speed."""

import importlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.benchmarks.case import TOLERANCE, Bar, Case, Limit, Op, Variant
from kernels.benchmarks.timing import Lap, Times, speedup, take_turns


class WrongResult(ValueError):
    """A variant is further from the float64 reference than its dtype allows."""


@dataclass(frozen=True)
class Result:
    """One run of a case.

    errors: relative, before timing. traffic: bytes that each phase cannot but move (every input read and every result
    written once). bars: those that hold on this hardware. skipped: why a variant could not run here.
    """

    case: Case
    errors: dict[str, float]
    times: dict[str, Times]
    traffic: dict[str, dict[str, int]]
    bars: tuple[Bar | Limit, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)

    def speedup(self, variant: str) -> float:
        """Over the baseline."""
        return speedup(self.times[variant], self.times[self.case.baseline])

    def measure(self, bar: Bar | Limit) -> float:
        return bar.measure(self.times)

    def is_met(self, bar: Bar | Limit) -> bool:
        return bar.is_met(self.measure(bar))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        case = self.case
        variants = {name: self._variant_to_dict(name, case.variants[name]) for name in self.times}
        bars = [{**asdict(bar), "measured": round(self.measure(bar), 3), "met": self.is_met(bar)} for bar in self.bars]
        summary = {"summary": case.summary, "shape": dict(case.shape), "baseline": case.baseline}
        return {**summary, "variants": variants, "skipped": self.skipped, "bars": bars}

    def _variant_to_dict(self, name: str, variant: Variant) -> dict[str, Any]:
        return {
            "dtype": _name(variant.dtype),
            "threads": variant.threads,
            **({} if variant.shape is None else {"shape": dict(variant.shape)}),
            "max_relative_error": float(f"{self.errors[name]:.2g}"),
            "speedup_over_baseline": round(self.speedup(name), 3),
            "bytes_by_phase": self.traffic[name],
            **self.times[name].to_dict(),
        }


def missing_packages(case: Case) -> dict[str, str]:
    """Variants that cannot run here for want of a package, and what importing it says."""
    missing = {}
    for name, variant in case.variants.items():
        if variant.needs is not None:
            try:
                importlib.import_module(variant.needs)
            except ImportError as error:  # not installed, or built for another torch
                missing[name] = str(error)
    return missing


def run_case(case: Case, repeats: int, device: torch.device, hardware: str = "") -> Result:
    """Check every variant on the small shape, then time forward and backward of all on the large one.

    `hardware`: its name, for the bars that hold on one kind only. Variants whose package is missing are left out.
    Raises WrongResult, before anything is timed, for a variant that is wrong.
    """
    threads, skipped = torch.get_num_threads(), missing_packages(case)
    variants = {name: variant for name, variant in case.variants.items() if name not in skipped}
    bars = tuple(bar for bar in case.bars if bar.hardware in hardware and variants.keys() >= {*bar.variants})
    try:
        errors = {name: check(case, name, device) for name in variants}
        problems = {name: _Problem(case, variant, device) for name, variant in variants.items()}
        times = take_turns({name: problem.run for name, problem in problems.items()}, repeats, device)
        traffic = {name: problem.traffic for name, problem in problems.items()}
        return Result(case, errors, times, traffic, bars, skipped)
    finally:
        torch.set_num_threads(threads)


def check(case: Case, name: str, device: torch.device) -> float:
    """The largest relative error of the results and every gradient against float64 autograd.

    Raises WrongResult where it exceeds the dtype's tolerance.
    """
    variant = case.variants[name]
    torch.set_num_threads(variant.threads)
    inputs = _inputs(case, variant, device, small=True)
    wide = {key: t.double() if t.is_floating_point() else t for key, t in inputs.items()}
    compute = _results_and_gradients if variant.backward else _results
    got, want = (compute(case, op, x) for op, x in ((variant.op, inputs), (variant.oracle, wide)))
    errors = {key: _relative_error(got[key], want[key]) for key in want}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= TOLERANCE[variant.dtype]:  # so written that NaN fails
        raise WrongResult(
            f"variant {name!r}: {worst} is off by {errors[worst]:.1e} of its largest value, "
            f"{_name(variant.dtype)} allows {TOLERANCE[variant.dtype]:.1e}; nothing is timed"
        )
    return errors[worst]


def _relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def _inputs(case: Case, variant: Variant, device: torch.device, *, small: bool) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    drawn = case.draw(case.check_shape if small else variant.shape or case.shape, generator)
    for name, t in drawn.items():
        if t.is_floating_point() and t.dim() > 1 and name not in case.wide:
            drawn[name] = t.to(variant.dtype)
        if variant.time_adjacent and t.dim() == 3:
            drawn[name] = drawn[name].mT.contiguous().mT
    return drawn


def _results_and_gradients(case: Case, op: Op, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if t.is_floating_point()}
    outputs = _tuple(op(**(inputs | leaves)))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), _cotangents(outputs))
    names = (f"the gradient of {name}" for name in leaves)
    return {**_named(outputs), **dict(zip(names, gradients, strict=True))}


@torch.no_grad()
def _results(case: Case, op: Op, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = _tuple(op(**inputs))
    return {**_named(outputs), **{f"{name} afterwards": inputs[name] for name in case.in_place}}


def _named(outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    if len(outputs) == 1:
        return {"the output": outputs[0].detach()}
    return {f"output {i}": output.detach() for i, output in enumerate(outputs)}


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _cotangents(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator(outputs[0].device).manual_seed(1)

    def draw(output: Tensor) -> Tensor:
        # Rounded to bf16, so that every dtype is handed the same numbers.
        return torch.randn(output.shape, generator=generator, device=output.device).bfloat16().to(output.dtype)

    return tuple(map(draw, outputs))


class _Problem:
    """A variant with its inputs at the timed shape."""

    def __init__(self, case: Case, variant: Variant, device: torch.device) -> None:
        self.variant = variant
        self.inputs = _inputs(case, variant, device, small=False)
        with torch.no_grad():
            self.cotangents = _cotangents(_tuple(variant.op(**self.inputs)))
        self.leaves = [t for t in self.inputs.values() if t.is_floating_point()] if variant.backward else []
        for leaf in self.leaves:
            leaf.requires_grad_()
        updated = {name: self.inputs[name] for name in case.in_place}
        self.traffic = {"forward": _bytes(self.inputs.values(), self.cotangents, updated.values())}
        if variant.backward:
            self.traffic["backward"] = _bytes(self.inputs.values(), self.cotangents, self.leaves)

    def run(self, lap: Lap) -> None:
        torch.set_num_threads(self.variant.threads)
        with torch.set_grad_enabled(self.variant.backward):
            outputs = _tuple(self.variant.op(**self.inputs))
        lap("forward")
        if self.variant.backward:
            torch.autograd.grad(outputs, self.leaves, self.cotangents)
            lap("backward")


def _bytes(*tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for group in tensors for t in group)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

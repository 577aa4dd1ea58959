"""Check, then time: a variant whose numbers are wrong has no speed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.benchmarks.cases import TOLERANCE, Bar, Case, Op, Variant
from kernels.benchmarks.timing import Lap, Times, take_turns


class WrongResult(ValueError):
    """A variant is further from the float64 reference than its dtype allows."""


@dataclass(frozen=True)
class Result:
    """One run of a case: its variants' errors (relative, before timing) and times."""

    case: Case
    errors: dict[str, float]
    times: dict[str, Times]

    def speedup(self, faster: str, slower: str) -> float:
        """How many times as fast, by medians."""
        return self.times[slower].median / self.times[faster].median

    def is_met(self, bar: Bar) -> bool:
        return self.speedup(bar.faster, bar.slower) >= bar.ratio

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        case = self.case
        variants = {
            name: {
                "dtype": _name(variant.dtype),
                "threads": variant.threads,
                "max_relative_error": float(f"{self.errors[name]:.2g}"),
                "speedup_over_baseline": round(self.speedup(name, case.baseline), 3),
                **self.times[name].to_dict(),
            }
            for name, variant in case.variants.items()
        }
        bars = [
            {
                **asdict(bar),
                "measured": round(self.speedup(bar.faster, bar.slower), 3),
                "met": self.is_met(bar),
            }
            for bar in case.bars
        ]
        summary = {"summary": case.summary, "shape": dict(case.shape), "baseline": case.baseline}
        return {**summary, "variants": variants, "bars": bars}


def run_case(case: Case, repeats: int, device: torch.device) -> Result:
    """Check every variant on the small shape, then time forward and backward of all on the large one.

    Raises WrongResult, before anything is timed, for a variant that is wrong.
    """
    threads = torch.get_num_threads()
    try:
        errors = {name: check(case, name, device) for name in case.variants}
        runs = {name: _timed(case, variant, device) for name, variant in case.variants.items()}
        return Result(case, errors, take_turns(runs, repeats, device))
    finally:
        torch.set_num_threads(threads)


def check(case: Case, name: str, device: torch.device) -> float:
    """The largest relative error of the output and every gradient against float64 autograd.

    Raises WrongResult where it exceeds the dtype's tolerance.
    """
    variant = case.variants[name]
    torch.set_num_threads(variant.threads)
    inputs = _inputs(case, variant, device, small=True)
    wide = {key: t.double() if t.is_floating_point() else t for key, t in inputs.items()}
    got, want = (_outputs_and_gradients(op, x) for op, x in ((variant.op, inputs), (variant.oracle, wide)))
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
    drawn = case.draw(case.check_shape if small else case.shape, generator)
    return {name: t.to(variant.dtype) if t.is_floating_point() and t.dim() > 1 else t for name, t in drawn.items()}


def _outputs_and_gradients(op: Op, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if t.is_floating_point()}
    out = op(**(inputs | leaves))
    gradients = torch.autograd.grad(out, list(leaves.values()), _cotangent(out))
    names = (f"the gradient of {name}" for name in leaves)
    return {"the output": out.detach(), **dict(zip(names, gradients, strict=True))}


def _cotangent(out: Tensor) -> Tensor:
    generator = torch.Generator(out.device).manual_seed(1)
    # Rounded to bf16, so that every dtype is handed the same numbers.
    return torch.randn(out.shape, generator=generator, device=out.device).bfloat16().to(out.dtype)


def _timed(case: Case, variant: Variant, device: torch.device) -> Callable[[Lap], None]:
    inputs = _inputs(case, variant, device, small=False)
    leaves = [t.requires_grad_() for t in inputs.values() if t.is_floating_point()]
    with torch.no_grad():
        cotangent = _cotangent(variant.op(**inputs))

    def run(lap: Lap) -> None:
        torch.set_num_threads(variant.threads)
        out = variant.op(**inputs)
        lap("forward")
        torch.autograd.grad(out, leaves, cotangent)
        lap("backward")

    return run


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

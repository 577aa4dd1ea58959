"""The start-up self-test: every op against its float64 reference, on the machine that is about to train.

A driver, a compiler or a chip may be wrong where every test of this repository has passed elsewhere. Wrong numbers
would cost the run and might not even show. `python -m kernels.selftest` tests by hand and prints a table.
"""

from collections.abc import Callable, Iterator

import torch

from kernels.selftest.cases import all_cases
from kernels.selftest.record import describe, identity, passed, remember
from kernels.selftest.runner import Outcome, check, is_interpreted

__all__ = ["SelfTestError", "outcomes", "require"]


class SelfTestError(RuntimeError):
    """An op computes wrongly on this machine."""


def outcomes(backend: str, device: torch.device, ops: list[str] | None = None) -> Iterator[Outcome]:
    """Run the cases of `ops` (None: of all) one by one on backend "cpu" or "triton"."""
    for case in all_cases():
        runs_here = case.interpreted is not None or not is_interpreted(backend, device)
        if runs_here and (ops is None or case.op in ops):
            yield check(case, backend, device)


def require(device: torch.device, say: Callable[[str], object] = print) -> None:
    """Test the ops as a run on `device` uses them, unless they have passed there with this software and code.

    A pass is kept below `$LONGHORN_CACHE`; where that can't be written, the next start tests again. `say` hears that a
    test starts and ends: with no kernel compiled yet it takes a minute or two on a GPU, seconds otherwise.

    Raises:
        SelfTestError: naming the first op that is wrong, its shape, tensor and error, and what to do.
    """
    backend = "triton" if device.type == "cuda" else "cpu"
    tested = identity(backend, device)
    if passed(tested):
        return
    say(f"self-test of the {backend} kernels on {describe(device)}, once for this device, software and code")
    count, seconds = 0, 0.0
    for outcome in outcomes(backend, device):
        if not outcome.passed:
            raise SelfTestError(_complaint(outcome, backend, device)) from outcome.raised
        count, seconds = count + 1, seconds + outcome.seconds
    try:
        remember(tested, device)
    except OSError as error:
        say(f"the self-test's pass could not be kept: {error}")
    say(f"self-test passed: {count} checks in {seconds:.1f} s")


def _complaint(outcome: Outcome, backend: str, device: torch.device) -> str:
    return (
        f"self-test of the {backend} kernels on {describe(device)}: {outcome.problem}. Nothing was trained. "
        "`python -m kernels.selftest --fresh` tests every op there. Where other machines pass with these versions of "
        "torch, triton and driver, leave this one out; else use other versions"
    )

"""The kernels' self-test on all of a node's GPUs."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from launch.preflight.command import CommandError, TimedOut, ask
from launch.preflight.findings import Finding
from launch.preflight.gpus import Gpu

Outcome = Literal["right", "unfinished"] | CommandError


def test_kernels(gpus: list[Gpu] | None, seconds: float) -> Finding:
    """Test the kernels on each GPU at once, or (None) on the CPU.

    A pass is remembered for that GPU, so that the trainer's own test then costs nothing. With no kernel compiled yet it
    may take longer than there is: that is no fault, what is compiled stays, and the trainer tests to the end.
    """
    if gpus is None:
        outcomes = {"CPU": _test("cpu", "cpu", "", seconds)}
    else:
        with ThreadPoolExecutor(max(1, len(gpus))) as pool:
            tested = pool.map(lambda gpu: _test("cuda", "triton", gpu.uuid, seconds), gpus)
            outcomes = dict(zip((f"GPU {gpu.index}" for gpu in gpus), tested, strict=True))
    wrong = [f"{place}: {_complaint(error)}" for place, error in outcomes.items() if isinstance(error, CommandError)]
    if "unfinished" in outcomes.values() and not wrong:
        return Finding("kernels", "warning", f"self-test not done in {seconds:.0f} s: the trainer goes on with it")
    return Finding.of("kernels", wrong, f"self-test passed on {', '.join(outcomes)}")


def _test(device: str, backend: str, visible: str, seconds: float) -> Outcome:
    command = (sys.executable, "-m", "kernels.selftest", "--device", device, "--backend", backend)
    try:
        ask(*command, seconds=seconds, extra={"CUDA_VISIBLE_DEVICES": visible})
    except TimedOut:
        return "unfinished"
    except CommandError as error:
        return error
    return "right"


def _complaint(error: CommandError) -> str:
    """The first wrong op's line, else what ended the test."""
    wrong = (line for line in error.output.splitlines() if "WRONG" in line)
    return " ".join(next(wrong, str(error)).split())

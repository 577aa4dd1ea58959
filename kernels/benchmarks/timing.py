"""Times of several variants, taken in turns: what slows the machine for a while slows all of them."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Lap = Callable[[str], None]  # called with the name of the phase that has just ended
FLUSH_BYTES = 2**28  # several times any GPU's L2
HOLD_CYCLES = 20_000_000  # some 11 ms of an H100: enough for the host to queue hundreds of launches
COPY_BYTES = 2**30


@dataclass(frozen=True)
class Times:
    """Milliseconds of each phase, one number a repeat."""

    phases: dict[str, list[float]]

    @classmethod
    def of(cls, laps: Iterable[tuple[str, float]]) -> "Times":
        """Of (phase, milliseconds) in the order taken."""
        phases: dict[str, list[float]] = {}
        for phase, milliseconds in laps:
            phases.setdefault(phase, []).append(milliseconds)
        return cls(phases)

    @property
    def totals(self) -> list[float]:
        return [sum(repeat) for repeat in zip(*self.phases.values(), strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.totals)

    def only(self, *phases: str) -> "Times":
        """Of these phases alone."""
        return Times({phase: self.phases[phase] for phase in phases})

    def to_dict(self) -> dict[str, Any]:
        """For JSON: medians and minima, and all totals to judge the noise by."""
        totals = self.totals
        return {
            "median_ms": round(self.median, 4),
            "min_ms": round(min(totals), 4),
            "median_ms_by_phase": {k: round(statistics.median(v), 4) for k, v in self.phases.items()},
            "all_ms": [round(total, 4) for total in totals],
        }


def speedup(faster: Times, slower: Times) -> float:
    """How many times as fast, by the medians of the phases that both have."""
    common = [phase for phase in slower.phases if phase in faster.phases]
    return slower.only(*common).median / faster.only(*common).median


def take_turns(
    runs: Mapping[str, Callable[[Lap], None]], repeats: int, device: torch.device, warmup: int = 2
) -> dict[str, Times]:
    """Each repeat runs every variant once; a run calls its argument at the end of each of its phases."""
    laps: dict[str, list[tuple[str, float]]] = {name: [] for name in runs}
    for repeat in range(-warmup, repeats):
        for name, run in runs.items():
            _settle(device)
            watch = Stopwatch(device)
            run(watch.lap)
            taken = watch.read()
            if repeat >= 0:
                laps[name] += taken
    return {name: Times.of(taken) for name, taken in laps.items()}


def _settle(device: torch.device) -> None:
    """Empty a GPU's cache, then hold it while the host queues what is timed: launching it is not counted."""
    if device.type == "cuda":
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
        torch.cuda._sleep(HOLD_CYCLES)


class Stopwatch:
    """The wall clock; on a GPU events of its stream, so that waiting for the host is not counted as such."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stamps: list[tuple[str, Any]] = []
        self.lap("start")

    def lap(self, phase: str) -> None:
        """A phase has ended: the work queued so far, on a GPU."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._stamps.append((phase, event))
        else:
            self._stamps.append((phase, time.perf_counter()))

    def read(self) -> list[tuple[str, float]]:
        """Each lap's phase and milliseconds."""
        if self._cuda:
            torch.cuda.synchronize()
        laps = zip(self._stamps, self._stamps[1:], strict=False)
        return [
            (phase, start.elapsed_time(end) if self._cuda else (end - start) * 1e3) for (_, start), (phase, end) in laps
        ]


def copy_rate(device: torch.device, repeats: int = 20) -> float:
    """Bytes a second, read and written, at which `device` copies 1 GiB within its memory."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)

    def copy(lap: Lap) -> None:
        target.copy_(source)
        lap("copy")

    return 2 * source.nbytes / (take_turns({"copy": copy}, repeats, device)["copy"].median / 1e3)

"""Times of several variants, taken in turns: what slows the machine for a while slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Lap = Callable[[str], None]  # called with the name of the phase that has just ended
FLUSH_BYTES = 2**28  # several times any GPU's L2


@dataclass(frozen=True)
class Times:
    """Milliseconds of each phase, one number a repeat."""

    phases: dict[str, list[float]]

    @property
    def totals(self) -> list[float]:
        return [sum(repeat) for repeat in zip(*self.phases.values(), strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.totals)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: medians and minima, and all totals to judge the noise by."""
        totals = self.totals
        return {
            "median_ms": round(self.median, 4),
            "min_ms": round(min(totals), 4),
            "median_ms_by_phase": {k: round(statistics.median(v), 4) for k, v in self.phases.items()},
            "all_ms": [round(total, 4) for total in totals],
        }


def take_turns(
    runs: Mapping[str, Callable[[Lap], None]], repeats: int, device: torch.device, warmup: int = 2
) -> dict[str, Times]:
    """Each repeat runs every variant once; a run calls its argument at the end of each of its phases."""
    times: dict[str, Times] = {name: Times({}) for name in runs}
    for repeat in range(-warmup, repeats):
        for name, run in runs.items():
            watch = _Stopwatch(device)
            run(watch.lap)
            if repeat >= 0:
                for phase, milliseconds in watch.read().items():
                    times[name].phases.setdefault(phase, []).append(milliseconds)
    return times


class _Stopwatch:
    """The wall clock; on a GPU events of its stream, so that waiting for the host is not counted."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stamps: list[tuple[str, Any]] = []
        if self._cuda:  # empties the cache, and keeps the GPU busy while the host queues what is timed
            torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
        self.lap("start")

    def lap(self, phase: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._stamps.append((phase, event))
        else:
            self._stamps.append((phase, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Milliseconds by phase."""
        if self._cuda:
            torch.cuda.synchronize()
        laps = zip(self._stamps, self._stamps[1:], strict=False)
        return {
            phase: start.elapsed_time(end) if self._cuda else (end - start) * 1e3 for (_, start), (phase, end) in laps
        }

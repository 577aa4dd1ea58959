"""Seconds of a device's own work."""

import time
from types import TracebackType

import torch


class DeviceClock:
    """Adds up the time between entering and leaving: by events on a GPU, which nothing waits for, else by the host.

    A collective inside counts too, so that ranks which wait for each other there look equally slow.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds, self._started = 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self.on_gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._started = time.perf_counter()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def read(self) -> float:
        """The seconds since the last call. Waits for the GPU to reach the last event."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds

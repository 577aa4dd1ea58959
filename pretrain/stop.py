"""What asks a run to stop: signals, and files that appear."""

import os
import signal
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

AGAIN = 1.0  # seconds: a terminal and the launcher both pass on one Ctrl-C, at once


class Stop(IntEnum):
    """Why a run stops, the stronger reason last; the names are status.json's."""

    NONE = 0
    SIGNAL = 1  # to be continued
    STOP_FILE = 2  # a person's wish: not before RUN/STOP is removed


class StopRequest:
    """Signals and files that ask this process to stop; ranks agree on them at the step's end.

    USR1 (a time limit is near) and INT wait for the step, TERM (preemption, or the launcher ends the job: KILL follows
    within 30 s) for the micro-batch. More of the same change nothing, so that a save under way is not disturbed; only
    a second INT ends the process at once.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self, stop_file: Path, job_file: Path | None = None) -> None:
        self.stop_file, self.job_file = stop_file, job_file
        self.urgent = False
        self._signalled = False
        self._interrupts: list[float] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        self.urgent |= number == signal.SIGTERM
        if number == signal.SIGINT:
            self._interrupts.append(time.monotonic())
            if self._interrupts[-1] - self._interrupts[0] > AGAIN:
                os.write(2, b"interrupted again: ending at once\n")
                os._exit(130)

    def wanted(self) -> Stop:
        """What this process has been asked, looking for the files too."""
        # os.path: an error of the disk, like a stale handle, is not a wish to stop, nor to fail.
        if os.path.exists(self.stop_file):
            return Stop.STOP_FILE
        if self._signalled or (self.job_file is not None and os.path.exists(self.job_file)):
            return Stop.SIGNAL
        return Stop.NONE

"""How far a long command is: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LOG_SECONDS = 30.0


class BytesProgress:
    """Shows bytes done, their rate and the time left, on standard error; used as a context."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._logged = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
            self._bar.add_task(what, total=total)

    def advance(self, count: int) -> None:
        """So many more bytes are done."""
        self._done += count
        if self._bar:
            self._bar.advance(self._bar.task_ids[0], count)
        elif (now := time.monotonic()) - self._logged >= LOG_SECONDS:
            self._logged = now
            print(self._line(now - self._started), file=sys.stderr, flush=True)

    def describe(self, what: str) -> None:
        """What is shown from now on."""
        self._what = what
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=what)

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        return (
            f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.1f} MB/s, "
            f"{left / 3600:.1f} h left"
        )

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

"""The next step's batches, read while this one computes."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """`read(step)` in a thread, for the step after the one that was asked for. Steps may come in any order.

    What was read for a step that nobody asked for is dropped, with its error. Leaving it ends the thread.
    """

    def __init__(self, read: Callable[[int], T], steps: int) -> None:
        """`steps`: nothing is read ahead from there on."""
        self._read, self._steps = read, steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[T]] | None = None
        self.waited_seconds = 0.0

    def __enter__(self) -> "ReadAhead[T]":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=error is None, cancel_futures=True)

    def __call__(self, step: int) -> T:
        """What was read for `step`; `waited_seconds` says how long that took. Raises what the reading did."""
        started = time.perf_counter()
        if self._ahead is None or self._ahead[0] != step:
            self._begin(step)
        assert self._ahead is not None
        (_, future), self._ahead = self._ahead, None
        result = future.result()
        self.waited_seconds = time.perf_counter() - started
        if step + 1 < self._steps:
            self._begin(step + 1)
        return result

    def _begin(self, step: int) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
        self._ahead = step, self._thread.submit(self._read, step)

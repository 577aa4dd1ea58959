"""A pool of processes that end with the command, however it ends; what they do is said elsewhere (`jobs.py`)."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.managers import SyncManager


class Stopped(Exception):
    """The command is ending; the part at hand is given up."""


class Link:
    """A worker's line to the command: bytes read go up, the request to stop comes down."""

    def __init__(self, manager: SyncManager) -> None:
        self._progress = manager.Queue()
        self._stop = manager.Event()

    def advance(self, count: int) -> None:
        """Report ``count`` more bytes of input read; raises Stopped once the command is ending."""
        self._progress.put(count)
        if self._stop.is_set():
            raise Stopped

    def stop(self) -> None:
        """Ask every worker to give up."""
        self._stop.set()

    def read_bytes(self) -> int:
        """Bytes reported since the last call."""
        return sum(self._progress.get() for _ in range(self._progress.qsize()))


@contextmanager
def worker_pool(workers: int) -> Iterator[tuple[ProcessPoolExecutor, Link]]:
    """A pool of processes, stopped early where the body raises."""
    # Forked from a server that has the imports done: no fork of a process that has threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_tools.parts"])
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    # Ctrl-C is the command's to handle: what starts here, and all that it starts, inherits a mask.
    # The tracker goes first because its start ends in unmasking.
    resource_tracker.ensure_running()
    unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
        manager.start(_end_with_parent)
        link = Link(manager)
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
        with manager, pool:
            try:
                # A pool left before its first worker runs ends in that worker's traceback.
                pool.submit(os.getpid).result()
                signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)
                yield pool, link
            except BaseException:
                link.stop()
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)


def _end_with_parent() -> None:
    # After a kill -9 of the command no worker may write on beside the workers of the next run.
    threading.Thread(target=_wait_for_parents_end, daemon=True).start()


def _wait_for_parents_end() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)

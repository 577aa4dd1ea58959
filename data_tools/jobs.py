"""Run a stage of equal jobs in the worker pool, with its progress."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import TypeVar

from data_tools.pool import Link
from data_tools.progress import BytesProgress

Job = TypeVar("Job")
Result = TypeVar("Result")
Workers = tuple[ProcessPoolExecutor, Link]

POLL_SECONDS = 0.2


def run_jobs(
    what: str, total: int, run: Callable[[Job, Callable[[int], None]], Result], jobs: Sequence[Job], workers: Workers
) -> list[Result]:
    """Results of `run(job, advance)`, in the jobs' order; the first error that a job raises is raised.

    Args:
        what: the stage, as the progress calls it.
        total: bytes that the jobs together report to their `advance`.
    """
    pool, link = workers
    futures = [pool.submit(run, job, link.advance) for job in jobs]
    pending = set(futures)
    with BytesProgress(what, total) as progress:
        while pending:
            done, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            progress.advance(link.read_bytes())
            for future in done:
                future.result()
    return [future.result() for future in futures]

"""One job at a time in a run's folder: two would take each other's checkpoints for their own."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.say import say

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Mesh

PATIENCE = 150.0  # seconds: a file server frees what a dead node held after its lease, 90 s or so
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class RunInUse(RuntimeError):
    """Another job trains in this folder."""


@contextmanager
def only_job(run_dir: Path, mesh: "Mesh") -> Iterator[None]:
    """Hold RUN/lock meanwhile; the system releases it when the process ends, however it does.

    Raises RunInUse on every rank where another job holds it.
    """
    path = run_dir / "lock"
    with path.open("a+") if mesh.rank == 0 else open(os.devnull) as file:
        if problem := mesh.from_first(_take(file.fileno(), path) if mesh.rank == 0 else None):
            raise RunInUse(problem)
        yield


def _take(descriptor: int, path: Path) -> str | None:
    """What stands against it, or None. Raises OSError where the disk fails."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in UNSUPPORTED:
                say(f"{path}: no locks on this file system; two jobs would not notice each other", problem=True)
                return None
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            holder = f"{path.read_text().strip() or 'unknown'} holds {path}"
        if time.monotonic() >= deadline:
            return f"another job trains in {path.parent}: {holder}"
        say(f"waiting for {path.parent}: {holder}", problem=True)
        time.sleep(min(PATIENCE, 30))
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    if job := os.environ.get("SLURM_JOB_ID"):
        owner = f"Slurm job {job}, {owner}"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{owner}\n".encode(), 0)
    return None

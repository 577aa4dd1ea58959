"""Locks on files, so that no two runs write the same thing; the system frees them when a process ends, in any way."""

import errno
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.shards import ShardError

UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def lock(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold the file's lock meanwhile, alone or with others that share it; ShardError where another run has it."""
    with open(path, "a+") as file:
        try:
            # Of the kind that also works between the nodes of a cluster.
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ShardError(f"{path.parent}: another run is writing there") from error
            if error.errno not in UNSUPPORTED:
                raise
            print(f"{path}: no locks on this file system; two runs would not notice each other", file=sys.stderr)
        yield

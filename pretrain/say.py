"""Lines for people. The log may lie on the disk that is full: a line that can't be written must not end a run."""

import contextlib
import sys


def say(line: str, problem: bool = False) -> None:
    """A line to stdout, or of a problem to stderr, at once."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr if problem else sys.stdout, flush=True)

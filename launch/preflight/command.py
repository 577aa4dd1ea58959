"""Running another program without trusting it to end."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence


class CommandError(RuntimeError):
    """A program is missing, failed, or did not end; the message says which and what it printed last.

    `output`: all that it printed to stdout.
    """

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class TimedOut(CommandError):
    """It did not end in time."""


def ask(*command: str, seconds: float, extra: Mapping[str, str] | None = None) -> str:
    """What a program prints to stdout, with `extra` in its environment.

    Raises CommandError where it can't start, ends with another code than 0 or (TimedOut) not within `seconds`.
    """
    name = _name(command)
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(extra or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise CommandError(f"{name}: {error.strerror}") from error
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        raise TimedOut(f"{name}: no answer in {seconds:.0f} s") from None
    if process.returncode:
        raise CommandError(f"{name}: exit code {process.returncode}: {_last_line(err) or _last_line(out)}", out)
    return out


def _name(command: Sequence[str]) -> str:
    """Of a Python module, its own."""
    return command[2] if command[1:2] == ("-m",) else os.path.basename(command[0])


def _end(process: subprocess.Popen[str]) -> None:
    """Kill it with its children. One that hangs in a driver outlives that, and is not waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")

"""Commands run side by side, each to its own log: what is complete is passed over, an end of this process ends them."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.say import say

POLL = 0.5  # seconds between looks at the processes
REPORT = 30.0  # seconds between lines of progress
PATIENCE = 300.0  # seconds that a process asked to end has for its checkpoint
LOG_LINES = 12  # of a failed command's log, shown
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class TaskFailed(RuntimeError):
    """A command that ended without being complete; the message names its log."""


@dataclass(frozen=True)
class Task:
    """One command. `seconds`: how long it takes alone, about; `failure()` says why it ended without being complete."""

    name: str
    command: tuple[str, ...]
    log: Path
    seconds: float
    complete: Callable[[], bool]
    progress: Callable[[], float]  # part of it that is done, while it runs
    failure: Callable[[], str]


class Pool:
    """Runs tasks, one a worker at a time, and says how far all is.

    Args:
        environments: of each worker's commands, over this process's own.
        tick: called every REPORT seconds, and at the end, with the seconds since it was last called.
    """

    def __init__(self, environments: Sequence[Mapping[str, str]], tick: Callable[[float], None]) -> None:
        self.environments, self.tick = environments, tick
        self._ticked = time.monotonic()
        self._worked = self._estimated = 0.0  # seconds of workers, and what they were thought to take

    def run(self, tasks: Sequence[Task], later: float) -> None:
        """Complete all tasks; `later`: the seconds of what comes after them.

        Raises TaskFailed where one fails; others are asked to save and end, as they are at an interrupt.
        """
        waiting = [task for task in tasks if not task.complete()]
        if done := len(tasks) - len(waiting):
            say(f"{done} of {len(tasks)} are done already")
        running: dict[int, _Running] = {}
        said = time.monotonic()
        try:
            while waiting or running:
                for worker in range(len(self.environments)):
                    if worker not in running and waiting:
                        running[worker] = _Running(waiting.pop(0), self.environments[worker])
                        say(f"begun: {running[worker].task.name}  (log {running[worker].task.log})")
                time.sleep(POLL)
                for worker in [w for w, one in running.items() if one.ended()]:
                    one = running.pop(worker)
                    self._finish(one)
                    say(f"done in {one.seconds:,.0f} s: {one.task.name}  {self._left(waiting, running, later)}")
                if time.monotonic() - said > REPORT:
                    said = time.monotonic()
                    say(self._left(waiting, running, later))
                    self._tick()
        finally:
            _end(list(running.values()))
            self._tick()

    def _finish(self, one: "_Running") -> None:
        task = one.task
        if not task.complete():
            lines = "\n".join(task.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise TaskFailed(
                f"{task.name} ended with exit code {one.process.returncode}, {task.failure()}\n"
                f"the end of {task.log}:\n{lines}"
            )
        self._worked += one.seconds
        self._estimated += task.seconds * (1 - one.progress_before)

    def _tick(self) -> None:
        now = time.monotonic()
        self.tick(now - self._ticked)
        self._ticked = now

    def _left(self, waiting: list[Task], running: "dict[int, _Running]", later: float) -> str:
        """How far the running ones are, and about how long all will take at the pace so far."""
        active = [(one.task, one.task.progress()) for one in running.values()]
        seconds = sum(task.seconds for task in waiting) + sum(task.seconds * (1 - part) for task, part in active)
        pace = self._worked / self._estimated if self._estimated else 1.0
        minutes = pace * (seconds + later) / len(self.environments) / 60
        parts = "".join(f"{task.name} {part:.0%}, " for task, part in active)
        return f"[{parts}{len(waiting)} wait; about {minutes:,.0f} min left in all]"


class _Running:
    """A started command."""

    def __init__(self, task: Task, environment: Mapping[str, str]) -> None:
        self.task, self.progress_before, self.started = task, task.progress(), time.monotonic()
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            self.process = subprocess.Popen(
                task.command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is ours to pass on
                preexec_fn=_end_with_parent,
            )
        self.seconds = 0.0

    def ended(self) -> bool:
        if self.process.poll() is None:
            return False
        self.seconds = time.monotonic() - self.started
        return True


def _end_with_parent() -> None:
    """In the child: be asked to save and end when this process is gone, even by SIGKILL; Linux only."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(running: Sequence[_Running]) -> None:
    """Ask each to save and end, and wait for that."""
    for one in running:
        if one.process.poll() is None:
            say(f"asked to save and end: {one.task.name}")
            one.process.terminate()
    for one in running:
        try:
            one.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(one.process.pid, signal.SIGKILL)  # torchrun's workers too
            one.process.wait()

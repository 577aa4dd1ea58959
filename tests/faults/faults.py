"""What can go wrong inside a rank: installed in its process before `pretrain.train.main`, which knows nothing of it.

A fault waits at a point (a function of the operating system or of the trainer, and what it was called with) and then
acts: kills, stops, signals, lets a write fail. What it did is a line of the faults file, for the test to read.
"""

import contextlib
import errno
import faulthandler
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import pretrain.data
import pretrain.train
import pretrain.trainer


@dataclass(frozen=True)
class Fault:
    """Done to rank `rank` (None: to each) at the `nth` call (0: at every one) of `point` that is about a `match`.

    `point`: a key of POINTS; its calls are about a path, or the number of a step.
    `after`: seconds after the call began, by a thread of its own; None: in its place, before it.
    `act`: a key of ACTIONS; `argument` is what it needs.
    """

    point: str
    act: str
    match: str = ""
    rank: int | None = None
    nth: int = 1
    after: float | None = None
    argument: Any = None


def install(faults: Sequence[Fault], rank: int, log: Path) -> None:
    """Arm this rank's faults; what they do is appended to `log`."""
    faulthandler.enable()
    injector = _Injector([f for f in faults if f.rank in (None, rank)], rank, log)
    for name, (owner, attribute, subject) in POINTS.items():
        if any(fault.point == name for fault in injector.faults):
            setattr(owner, attribute, injector.watch(name, getattr(owner, attribute), subject))


class _Injector:
    def __init__(self, faults: list[Fault], rank: int, log: Path) -> None:
        self.faults, self.rank, self.log = faults, rank, log
        self.calls = dict.fromkeys(range(len(faults)), 0)

    def watch(self, point: str, function: Callable[..., Any], subject: Callable[..., str]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            about = subject(*args, **kwargs)
            for fault in self._due(point, about):
                if fault.after is not None:
                    threading.Timer(fault.after, self._act, [fault, about]).start()
                elif fault.act == "kill all, half written":
                    function(*args, **kwargs)
                    os.truncate(about, os.path.getsize(about) // 2)
                    self._act(fault, about)
                elif fault.act == "nan":
                    return self._poisoned(function(*args, **kwargs), fault)
                else:
                    self._act(fault, about)
            return function(*args, **kwargs)

        return watched

    def _due(self, point: str, about: str) -> list[Fault]:
        due = []
        for i, fault in enumerate(self.faults):
            if fault.point == point and re.search(fault.match, about):
                self.calls[i] += 1
                if fault.nth in (0, self.calls[i]):
                    due.append(fault)
        return due

    def _act(self, fault: Fault, about: str) -> None:
        self._record(fault, about)
        ACTIONS[fault.act](fault.argument)

    def _record(self, fault: Fault, about: str) -> None:
        line = asdict(fault) | {"rank": self.rank, "about": about, "time": time.time(), "where": _where()}
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _poisoned(self, model: torch.nn.Module, fault: Fault) -> torch.nn.Module:
        """The model, whose gradient is NaN in the backward passes whose numbers (from 1) are listed, or in all."""
        passes = 0

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal passes
            passes += 1
            if fault.argument is not None and passes not in fault.argument:
                return gradient
            self._record(fault, f"backward {passes}")
            return gradient * torch.nan

        model.blocks[0].mixer.out_proj.weight.register_hook(poison)  # type: ignore[union-attr]
        return model


def _where() -> str:
    """What each of this project's threads is at: the innermost line of its own code."""
    root, here = str(Path(pretrain.trainer.__file__).parents[1]), os.path.dirname(__file__)
    places = []
    for frame in sys._current_frames().values():
        while frame and (not frame.f_code.co_filename.startswith(root) or frame.f_code.co_filename.startswith(here)):
            frame = frame.f_back  # type: ignore[assignment]
        if frame and "/.venv/" not in frame.f_code.co_filename:
            places.append(f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})")
    return ", ".join(sorted(places))


def _no_space(_: None) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _storm(names: list[str]) -> None:
    """Signals to every rank (they are one process group), one after the other."""
    for name in names:
        os.killpg(0, signal.Signals[name])
        time.sleep(0.002)


def _fill(path: str) -> None:
    """A file that takes all that its file system has left."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


# The ranks of a job form a process group of their own: 0 means all of them.
ACTIONS: dict[str, Callable[[Any], None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "kill all": lambda _: os.killpg(0, signal.SIGKILL),
    "kill all, half written": lambda _: os.killpg(0, signal.SIGKILL),  # see `watch`
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "signal": lambda name: os.kill(os.getpid(), signal.Signals[name]),
    "signal all": _storm,
    "signal launcher": lambda name: os.kill(os.getppid(), signal.Signals[name]),
    "no space": _no_space,
    "fill": _fill,
    "touch": lambda path: Path(path).touch(),
    "run": lambda command: subprocess.run(command, check=True),
    "nan": lambda _: None,  # the model's gradients, see `_poisoned`
    "note": lambda _: None,
}


def _fsynced(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


# Name → the function's owner and name there, and what a call is about.
POINTS: dict[str, tuple[Any, str, Callable[..., str]]] = {
    "rename": (os, "rename", lambda source, target: str(target)),
    "replace": (os, "replace", lambda source, target: str(target)),
    "fsync": (os, "fsync", _fsynced),
    "tensors": (safetensors.torch, "serialize_file", lambda tensors, filename, **_: str(filename)),
    "bytes": (Path, "write_bytes", lambda path, content: str(path)),
    "arguments": (pretrain.train, "load_config", lambda *_: ""),
    "data": (pretrain.data, "open_dataset", lambda path: str(path)),
    "model": (pretrain.trainer, "build_model", lambda *_: ""),
    "step": (pretrain.trainer.Trainer, "train_step", lambda trainer: str(trainer.progress.step + 1)),
    "validation": (pretrain.trainer.ValidationLoss, "measure", lambda *_: ""),
}

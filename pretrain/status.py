"""RUN/status.json: how the run last stopped, for people and for the launch scripts."""

import time
from pathlib import Path
from typing import Any

import orjson

from data_tools.files import write_durably
from pretrain.say import say

REASONS = {
    "running": "at work, or killed at it",
    "done": "all tokens are consumed",
    "signal": "asked to stop, and to be continued",
    "stop_file": "RUN/STOP is there: to be continued when it is removed",
    "bad_input": "config, data or checkpoint are not this run's: starting again does not help",
    "not_finite": "losses or gradients stayed without a finite value: starting again does not help",
    "checkpoint": "a checkpoint could not be written; earlier ones are sound",
    "hang": "a rank made no progress; stacks in RUN/logs",
    "error": "anything else",
}


def write_status(run_dir: Path, reason: str, step: int = 0, consumed_tokens: int = 0, detail: str = "") -> None:
    """One line of JSON, whole or not at all; only on a full disk written over the line before."""
    assert reason in REASONS
    values = {"reason": reason, "step": step, "consumed_tokens": consumed_tokens, "detail": detail, "time": time.time()}
    path, line = run_dir / "status.json", orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_durably(path, line)
    except OSError as error:
        _overwrite(path, line)
        say(f"{path} could not be replaced ({error.strerror}): {line.decode().rstrip()}", problem=True)


def _overwrite(path: Path, line: bytes) -> None:
    try:
        with path.open("r+b") as file:
            file.write(line)
            file.truncate()
    except OSError:
        pass  # said above


def write_failure(run_dir: Path, reason: str, step: int, consumed_tokens: int, detail: str) -> None:
    """Any rank's account of its end, unless one was given before: the first failure causes the others."""
    if read_status(run_dir).get("reason") in (None, "running"):
        write_status(run_dir, reason, step, consumed_tokens, detail)


def read_status(run_dir: Path) -> dict[str, Any]:
    """The last status, or {} where there is none or it can't be read."""
    try:
        return orjson.loads((run_dir / "status.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}

"""Run a command to its end, and the memory that it and the processes it starts take meanwhile (Linux)."""

import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.1


class CommandFailed(Exception):
    """The command ended with another status than 0; the message has the end of what it said."""


@dataclass(frozen=True)
class Usage:
    """Wall-clock seconds, the most resident memory of any one process, and of all at one time.

    `total_bytes` counts memory that processes share once; between two samples it may have been higher.
    """

    seconds: float
    process_bytes: int
    total_bytes: int


def run_measured(command: Sequence[str]) -> Usage:
    """Run the command.

    Raises:
        CommandFailed: it ended with another status than 0.
    """
    most = together = 0
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT) as process:
            while not _ended(process):
                pids = _tree(process.pid)
                most = max(most, *(_kibibytes(pid, "status", "VmHWM") for pid in pids))
                together = max(together, sum(_kibibytes(pid, "smaps_rollup", "Pss") for pid in pids))
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            raise CommandFailed(f"{' '.join(command)}: status {process.returncode}: {said.read()[-2000:]}")
    return Usage(seconds, most * 1024, together * 1024)


def _ended(process: subprocess.Popen) -> bool:
    try:
        process.wait(SAMPLE_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = [child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in _read(task).split()]
    return [pid, *(found for child in children for found in _tree(int(child)))]


def _kibibytes(pid: int, file: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", _read(Path(f"/proc/{pid}/{file}")), re.MULTILINE)
    return int(found[1]) if found else 0


def _read(path: Path) -> str:
    """A file of /proc, empty where the process has ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""

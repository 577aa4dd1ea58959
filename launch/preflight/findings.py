"""What a check found, and a node's report of all of them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import orjson
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from data_tools.files import write_durably

Level = Literal["ok", "warning", "bad"]
STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "bad": "bold red"}
FABRIC = "fabric"  # the check of all nodes together, and its report's name
LOG_WIDTH = 160  # columns, where the output is no terminal


@dataclass(frozen=True)
class Finding:
    """One check's outcome. `same`: every node must find this very detail."""

    check: str
    level: Level
    detail: str
    same: bool = False

    @classmethod
    def of(cls, check: str, problems: list[str], fine: str, same: bool = False) -> Self:
        """Bad where there are problems, and `fine` where there are none."""
        return cls(check, "bad", "; ".join(problems)) if problems else cls(check, "ok", fine, same)


@dataclass(frozen=True)
class NodeReport:
    """All that one node found about itself."""

    node: str
    seconds: float
    findings: list[Finding]

    @property
    def bad(self) -> bool:
        return any(finding.level == "bad" for finding in self.findings)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, orjson.dumps(self, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None where there is no whole report."""
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None


def console() -> Console:
    """Of stdout, wide where it is a log file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=LOG_WIDTH)


def setting(name: str, default: float) -> float:
    """A number from the environment. Raises ValueError naming the variable."""
    text = os.environ.get(name) or str(default)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} in the environment or site.env is no number") from None

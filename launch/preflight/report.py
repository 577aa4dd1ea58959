"""All nodes' reports side by side: which node is bad by itself, or unlike the others."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import orjson
from pydantic import TypeAdapter
from rich.markup import escape
from rich.table import Table

from launch.preflight.findings import FABRIC, STYLES, Finding, NodeReport, console
from launch.preflight.software import MISSING


def report(directory: Path, expected: list[str]) -> int:
    """Print all; 1 where a node is bad, its name in the last line."""
    if not expected:
        raise ValueError("--expect names no node; it takes the job's, like gpu001,gpu002")
    fabric = _read_fabric(directory / f"{FABRIC}.json")
    reports = compare([_with(_read(directory, name), fabric.get(name)) for name in expected])
    _show(reports)
    if bad := [node.node for node in reports if node.bad]:
        print(f"bad nodes: {','.join(bad)}", flush=True)
    return 1 if bad else 0


def _read(directory: Path, name: str) -> NodeReport:
    found = NodeReport.read(directory / f"{name}.json")
    nothing = Finding("report", "bad", "no report: the node did not answer, or its check was killed")
    return NodeReport(name, 0.0, [nothing]) if found is None else replace(found, node=name)


def _read_fabric(path: Path) -> dict[str, Finding]:
    """Findings by node, where the nodes have been checked together."""
    if not path.exists():
        return {}
    return TypeAdapter(dict[str, Finding]).validate_python(orjson.loads(path.read_bytes())["findings"])


def _with(node: NodeReport, finding: Finding | None) -> NodeReport:
    return node if finding is None else replace(node, findings=[*node.findings, finding])


def compare(reports: list[NodeReport]) -> list[NodeReport]:
    """The same, where what must be the same on all nodes, and is not, is bad on the fewer."""
    details: dict[str, list[str]] = {}
    for node in reports:
        for finding in node.findings:
            if finding.same:
                details.setdefault(finding.check, []).append(finding.detail)
    right = {check: _prevailing(found) for check, found in details.items()}
    return [replace(node, findings=[_compared(finding, right) for finding in node.findings]) for node in reports]


def _prevailing(details: list[str]) -> str:
    """What most nodes have; of equally many what misses nothing, then what the first node has."""
    counts = Counter(details)
    return max(counts, key=lambda detail: (counts[detail], MISSING not in detail, -details.index(detail)))


def _compared(finding: Finding, right: dict[str, str]) -> Finding:
    if not finding.same or finding.detail == right[finding.check]:
        return finding
    return replace(finding, level="bad", detail=f"{finding.detail}; the other nodes have {right[finding.check]}")


def _show(reports: list[NodeReport]) -> None:
    checks = list(dict.fromkeys(finding.check for node in reports for finding in node.findings))
    out, table = console(), Table("node", *checks, "seconds", box=None)
    for node in reports:
        levels = {finding.check: finding.level for finding in node.findings}
        cells = [f"[{STYLES[levels[check]]}]{levels[check]}[/]" if check in levels else "–" for check in checks]
        table.add_row(node.node, *cells, f"{node.seconds:.0f}")
    out.print(table)
    for node in reports:
        for finding in node.findings:
            if finding.level != "ok":
                style = STYLES[finding.level]
                line = f"{node.node}: [{style}]{finding.check}[/]: {escape(finding.detail)}"
                out.print(line, soft_wrap=True)
    sys.stdout.flush()

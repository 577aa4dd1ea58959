"""One node's check of itself, with no other node's help: a broken one must not keep the others waiting."""

import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from launch.preflight.command import CommandError
from launch.preflight.findings import STYLES, Finding, NodeReport, console
from launch.preflight.gpus import Gpu, gpu_findings, query
from launch.preflight.host import check_clock, check_disks, check_names
from launch.preflight.selftest import test_kernels
from launch.preflight.software import ask_software

LIMIT_SECONDS = 105.0  # for all of it: whoever started this waits two minutes


@dataclass(frozen=True)
class NodeOptions:
    """What the job wants of this node."""

    gpus: int
    run_dir: Path
    config: str
    overrides: list[str]
    head_time: float | None


def check_and_report(options: NodeOptions, path: Path) -> int:
    """Check, print, write the report; 0, 1 where this node is bad, 2 where the config is."""
    started, name = time.monotonic(), os.environ.get("SLURMD_NODENAME") or platform.node()
    findings = check(options, name)
    report = NodeReport(name, round(time.monotonic() - started, 1), findings)
    _show(report)
    try:
        report.write(path)
    except OSError as error:
        print(f"preflight: {name}: cannot write {path}: {error}", file=sys.stderr)
        return 1
    if any(finding.check == "config" and finding.level == "bad" for finding in findings):
        return 2
    return 1 if report.bad else 0


def check(options: NodeOptions, name: str) -> list[Finding]:
    """All checks, side by side where one does not need another's answer."""
    deadline = time.monotonic() + LIMIT_SECONDS
    with ThreadPoolExecutor() as pool:
        software = pool.submit(ask_software, options.config, options.overrides)
        names = pool.submit(check_names, name)
        clock = pool.submit(check_clock, options.run_dir, options.head_time)
        gpu_results = _check_gpus(options.gpus)
        kernels = pool.submit(_check_kernels, *gpu_results, deadline)
        clock.result()  # it has made the run's directory
        known, software_findings = software.result()
        disks = check_disks(options.run_dir, known)
        return [*gpu_results[1], kernels.result(), *software_findings, *disks, names.result(), clock.result()]


def _check_gpus(expected: int) -> tuple[list[Gpu] | None, list[Finding]]:
    """The GPUs (None: the run is on CPUs) and what is found about them."""
    # A node that has lost its driver looks like one that never had GPUs: it must be told.
    if os.environ.get("PREFLIGHT_CPU") == "1":
        return None, [Finding("GPUs", "ok", "none: PREFLIGHT_CPU=1")]
    try:
        gpus = query()
    except CommandError as error:
        return [], [Finding("GPUs", "bad", f"0 visible, needs {expected}: {error}")]
    return gpus, gpu_findings(gpus, expected)


def _check_kernels(gpus: list[Gpu] | None, findings: list[Finding], deadline: float) -> Finding:
    """Not on GPUs that are known to be bad: the test could hang, and would tell nothing new."""
    if any(finding.level == "bad" for finding in findings):
        return Finding("kernels", "warning", "not tested: the GPUs are not in order")
    return test_kernels(gpus, deadline - time.monotonic())


def _show(report: NodeReport) -> None:
    table = Table("check", "", "found", title=f"{report.node}: checked in {report.seconds:.0f} s", box=None)
    for finding in report.findings:
        table.add_row(finding.check, f"[{STYLES[finding.level]}]{finding.level}[/]", escape(finding.detail))
    console().print(table)

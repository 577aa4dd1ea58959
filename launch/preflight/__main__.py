"""Command: check the nodes of a job before it trains.

node    this node alone: GPUs, software, disks, names, clock; writes its report
report  all nodes' reports in one table; the last line names the bad nodes
fabric  all nodes together, under torchrun: a timed matrix product and timed all-reduces
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a node is bad; 2 where the config or a setting is, which no other node mends."""
    parsed = _parser().parse_args(arguments)
    try:
        return _run(parsed)
    except ValueError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return 2


def _run(parsed: argparse.Namespace) -> int:
    # Each imports what it needs: a report must not wait for torch.
    if parsed.command == "node":
        from launch.preflight.node import NodeOptions, check_and_report

        names = ("gpus", "run_dir", "config", "overrides", "head_time")
        return check_and_report(NodeOptions(**{name: getattr(parsed, name) for name in names}), parsed.report)
    if parsed.command == "report":
        from launch.preflight.report import report

        return report(parsed.directory, [name for name in parsed.expect.split(",") if name])
    from launch.preflight.fabric import measure_and_report

    return measure_and_report(parsed.report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    node = commands.add_parser("node", help="check this node")
    node.add_argument("--gpus", type=int, required=True, help="processes that the job starts here, each with a GPU")
    node.add_argument("--run-dir", type=Path, required=True, help="the run's directory; made where it is missing")
    node.add_argument("--report", type=Path, required=True, help="the JSON file to write")
    node.add_argument("--config", required=True, help="the run's YAML file")
    node.add_argument("--head-time", type=float, help="seconds since 1970 by the clock of the job's first node")
    node.add_argument("overrides", nargs="*", metavar="key=value", help="of the config's keys")
    report = commands.add_parser("report", help="all nodes' reports in one table")
    report.add_argument("directory", type=Path, help="where the nodes wrote them, as NODE.json")
    report.add_argument("--expect", required=True, help="the nodes that should have, like gpu001,gpu002")
    fabric = commands.add_parser("fabric", help="time GPUs and network of all nodes together, under torchrun")
    fabric.add_argument("--report", type=Path, required=True, help="the JSON file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())

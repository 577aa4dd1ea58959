"""Command: time the kernels' variants side by side, print the ratios, record the run."""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kernels.benchmarks.case import Case
from kernels.benchmarks.cases import cases_for
from kernels.benchmarks.record import hardware_name, hardware_slug, provenance, write_json
from kernels.benchmarks.runner import Result, WrongResult, run_case
from kernels.benchmarks.timing import copy_rate

RESULTS = Path(__file__).with_name("results")


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a variant is wrong or, with --check, a bar is missed; 2 for arguments that don't fit."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cases = cases_for(device)
    if options.list:
        for name, case in cases.items():
            print(f"{name:24} {case.summary}: {', '.join(case.variants)}")
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU here")
    if problem := _unknown_case(options.cases, cases):
        parser.error(problem)

    record, console = provenance(device), Console()
    copied = copy_rate(device) if device.type == "cuda" else None
    if copied:
        console.print(f"a copy on the device moves {copied / 1e9:,.0f} GB/s, read and written\n", highlight=False)
    all_met = True
    for name in options.cases or cases:
        try:
            result = run_case(cases[name], options.repeats, device, hardware_name(device))
        except WrongResult as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        show(name, result, console, copied)
        path = options.output / f"{name}-{hardware_slug(device)}.json"
        settings = {"repeats": options.repeats, "copy_bytes_per_second": copied}
        write_json(path, {"case": name, **record, **settings, **result.to_dict()})
        console.print(f"recorded in {path}\n", highlight=False, soft_wrap=True)
        all_met &= all(map(result.is_met, result.bars))
    return 0 if all_met or not options.check else 1


def show(name: str, result: Result, console: Console, copied: float | None) -> None:
    """Print a case's table in ms, and its bars met or missed.

    copied: bytes a second of a copy; what each variant cannot but move is then shown as a time at that rate.
    """
    case = result.case
    shape = ", ".join(f"{key} {value}" for key, value in case.shape.items())
    console.print(f"[bold]{name}[/]: {case.summary} ({shape})", highlight=False)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("variant")
    columns = ("forward", "backward", "all, ms", "minimum", *(("copy",) if copied else ()), "speed", "error")
    for column in columns:
        table.add_column(column, justify="right")
    for variant, times in result.times.items():
        phases = (times.only(phase).median if phase in times.phases else None for phase in ("forward", "backward"))
        floor = (sum(result.traffic[variant].values()) / copied * 1e3,) if copied else ()
        table.add_row(
            variant,
            *("" if ms is None else f"{ms:.3g}" for ms in (*phases, times.median, min(times.totals), *floor)),
            f"{result.speedup(variant):.2f}×",
            f"{result.errors[variant]:.0e}",
        )
    console.print(table, highlight=False)
    copy = "; copy: reading inputs and writing results once, at a copy's rate" if copied else ""
    console.print(f"speed: over {case.baseline!r}, by medians of the phases both have{copy}", highlight=False)
    for variant, why in result.skipped.items():
        console.print(f"skipped {variant!r}: {why}", highlight=False, markup=False)
    for bar in result.bars:
        verdict = "[green]bar met[/]" if result.is_met(bar) else "[red]bar missed[/]"
        console.print(f"{verdict}: {bar.describe(result.measure(bar))}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels.benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="see --list; all by default")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--repeats", type=_positive, default=10, help="of each variant (default: 10)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return int(text)


def _unknown_case(names: Sequence[str], cases: Mapping[str, Case]) -> str | None:
    for name in names:
        if name not in cases:
            close = difflib.get_close_matches(name, cases, n=1)
            return f"no case {name!r} on this device" + (
                f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(cases)}"
            )
    return None


if __name__ == "__main__":
    sys.exit(main())

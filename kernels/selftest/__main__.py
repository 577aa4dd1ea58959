"""Command: test every op against its float64 reference on this machine.

Without a GPU it tests the C++ kernels, and Triton's under the interpreter (half a minute).
"""

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from kernels.selftest import outcomes
from kernels.selftest.cases import all_cases
from kernels.selftest.record import identity, passed, remember
from kernels.selftest.runner import Outcome, is_interpreted

ROW = "{:20}  {:26}  {:5}  {:26}  {:>7}  {:>7}  {:>7}  {}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where an op is wrong; 2 for arguments that don't fit."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backends = [options.backend] if options.backend else ["triton"] if device.type == "cuda" else ["cpu", "triton"]
    if impossible := _impossible(device, backends):
        parser.error(impossible)
    if "triton" in backends and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it where it is first imported, which may be behind us: in a process of its own.
        command = [sys.executable, "-m", "kernels.selftest", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    sound = [_test(backend, device, options.only, options.fresh) for backend in backends]
    return 0 if all(sound) else 1


def _parser() -> argparse.ArgumentParser:
    ops = list(dict.fromkeys(case.op for case in all_cases()))
    parser = argparse.ArgumentParser(prog="python -m kernels.selftest", description=__doc__)
    parser.add_argument("--backend", choices=("triton", "cpu"), help="one of those that the device has; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a GPU where there is one")
    parser.add_argument("--only", nargs="+", choices=ops, metavar="OP", help=f"of {', '.join(ops)}; not recorded")
    parser.add_argument("--fresh", action="store_true", help="test again what has passed before")
    return parser


def _impossible(device: torch.device, backends: Sequence[str]) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no GPU here"
    if device.type == "cuda" and "cpu" in backends:
        return "--backend cpu: its kernels are not for a GPU; add --device cpu"
    if "triton" in backends and find_spec("triton") is None:
        return "triton is not installed; --backend cpu tests without it"
    return None


def _test(backend: str, device: torch.device, ops: list[str] | None, fresh: bool) -> bool:
    """Print the table as it grows; whether all is right."""
    tested = identity(backend, device)
    where = f"{backend} kernels on {tested['device']}"
    record = None if fresh or ops else passed(tested)
    if record:
        print(f"{where}: passed on {record['date']} with this software and code; --fresh tests again")
        return True
    if is_interpreted(backend, device):  # it computes rows' padding too, which may hold anything
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    print(f"{where}, torch {tested['torch']}")
    print(ROW.format("op", "case", "dtype", "furthest off", "error", "allowed", "seconds", ""), flush=True)
    wrong = count = 0
    for outcome in outcomes(backend, device, ops):
        _print_row(outcome)
        count, wrong = count + 1, wrong + (not outcome.passed)
    print(f"{count - wrong} of {count} right", flush=True)
    if not wrong and not ops:
        try:
            remember(tested, device)
        except OSError as error:
            print(f"the pass could not be recorded: {error}", file=sys.stderr)
    return not wrong


def _print_row(outcome: Outcome) -> None:
    case, worst = outcome.case, outcome.worst
    deviation = ("", "", "") if worst is None else (worst.tensor, f"{worst.error:.1e}", f"{worst.allowed:.1e}")
    verdict = "ok" if outcome.passed else f"WRONG at {outcome.shape_text}"
    print(ROW.format(case.op, case.name, outcome.dtype_name, *deviation, f"{outcome.seconds:.2f}", verdict), flush=True)
    if outcome.raised is not None:
        print(f"    {type(outcome.raised).__name__}: {outcome.raised}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Command: what the Triton kernels compile to, read on a machine without a GPU.

    python -m kernels.benchmarks.compiled [--capability 80 90] [--launch NAME …] [--json]

Runs the ops' own host code on small CPU tensors while every launch stops after compiling for the GPU named, then reads
registers, spills and the machine code of each kernel's loops with the tools that Triton ships. "per 32" is what the
scans are judged by: instructions for 32 (channel, token) pairs, one for each lane of a warp. For a backward that is the
loop that walks back and, for all but a chunk's last group, the loop that rebuilds states.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels.benchmarks.launches import LAUNCHES

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Loop:
    """An innermost loop: how often each opcode stands in it."""

    opcodes: Counter[str]

    @property
    def instructions(self) -> int:
        return self.opcodes.total()


@dataclass(frozen=True)
class Compiled:
    """One kernel for one set of arguments."""

    name: str
    cubin: bytes
    warps: int
    shared_bytes: int
    constants: Mapping[str, int]  # STEPS and CHUNK, of kernels that walk time

    @cached_property
    def resources(self) -> dict[str, int]:
        """Registers a thread (REG), bytes of stack: spilled (STACK) and more, as cuobjdump names them."""
        found = re.findall(r"(REG|STACK|LOCAL):(\d+)", self._read("cuobjdump", "-res-usage"))
        return {name: int(value) for name, value in found}

    @cached_property
    def loops(self) -> list[Loop]:
        """The innermost loops, longest first."""
        return sorted(innermost_loops(self._read("nvdisasm", "-c")), key=lambda loop: -loop.instructions)

    @property
    def per_32_pairs(self) -> float | None:
        """Instructions of the walk for 32 (channel, token) pairs; None where none walks, or many warps do."""
        if not self.constants or self.warps > 1:
            return None
        steps, chunk = self.constants["STEPS"], self.constants["CHUNK"]
        per_group = float(self.loops[0].instructions)
        if self.loops[0].opcodes["SHFL"]:  # sums over channels: a backward
            rebuild = next(loop for loop in self.loops if not loop.opcodes["SHFL"])
            per_group += rebuild.instructions * (1 - steps / chunk)
        return per_group / steps

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kernel": self.name,
            "warps": self.warps,
            "registers": self.resources["REG"],
            "spilled": self.resources["STACK"],
            "shared": self.shared_bytes,
            "per_32_pairs": self.per_32_pairs,
            "loops": [loop.opcodes for loop in self.loops],
        }

    def _read(self, tool: str, flag: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [str(TOOLS / tool), flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def innermost_loops(sass: str) -> list[Loop]:
    """Every backward branch that has no other inside, with what it repeats."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            instructions.append(found[1])
    for i, instruction in enumerate(instructions):
        target = re.match(r"BRA\b.*(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], len(instructions)) < i:
            branches.append((labels[target[1]], i))
    inner = [
        (first, last)
        for first, last in branches
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in branches)
    ]
    return [Loop(Counter(re.split(r"[\s.]", i)[0] for i in instructions[a : b + 1])) for a, b in inner]


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Compiled]]:
    """Inside, launches compile for sm_`capability` and stop there; the list fills with what they compile."""
    compiled: list[Compiled] = []
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        details = kernel.metadata
        constants = {name: kwargs[name] for name in ("STEPS", "CHUNK")} if "STEPS" in kwargs else {}
        compiled.append(Compiled(kernel.name, kernel.asm["cubin"], details.num_warps, details.shared, constants))
        return kernel

    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(capability))
    try:
        with mock.patch.object(JITFunction, "run", run), mock.patch("kernels.triton_launch.INTERPRETED", True):
            yield compiled
    finally:
        triton.runtime.driver._active = active


class _Driver:
    """Names a GPU and never touches one."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels compiled before are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(capability: int, launches: dict[str, Callable[[], None]]) -> dict[str, list[Compiled]]:
    """Each launch's kernels, in the order they were launched."""
    result = {}
    for name, launch in launches.items():
        with compiling_for(capability) as compiled:
            launch()
        result[name] = compiled
    return result


def show(rows: dict[str, list[Compiled]], capability: int, console: Console) -> None:
    """A table of every kernel, a row each."""
    columns = ("launch", "kernel", "warps", "registers", "spilled", "shared", "per 32", "loops")
    table = Table(*columns, box=SIMPLE_HEAD)
    for name, kernels in rows.items():
        for kernel in kernels:
            loops = ", ".join(str(loop.instructions) for loop in kernel.loops if loop.instructions > 1)
            counts = (kernel.warps, kernel.resources["REG"], kernel.resources["STACK"], kernel.shared_bytes)
            per_32 = "" if kernel.per_32_pairs is None else f"{kernel.per_32_pairs:.1f}"
            table.add_row(name, kernel.name, *map(str, counts), per_32, loops)
    console.print(f"sm_{capability}, Triton {triton.__version__}; bytes, and instructions of the innermost loops")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; arguments that don't fit end with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.benchmarks.compiled", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90], help="sm_ numbers (default: 80 90)")
    parser.add_argument(
        "--launch",
        nargs="+",
        choices=LAUNCHES,
        default=list(LAUNCHES),
        metavar="NAME",
        help="of: %(choices)s (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, loops with their opcodes, instead of tables")
    options = parser.parse_args(arguments)
    launches = {name: LAUNCHES[name] for name in options.launch}
    compiled = {capability: compile_launches(capability, launches) for capability in options.capability}
    if options.json:
        tables = {
            c: {name: [k.to_dict() for k in kernels] for name, kernels in rows.items()} for c, rows in compiled.items()
        }
        print(json.dumps(tables))
        return 0
    for capability, rows in compiled.items():
        show(rows, capability, Console(width=160))
    return 0


if __name__ == "__main__":
    sys.exit(main())

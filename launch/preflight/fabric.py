"""All nodes together, before they train: each GPU's matrix product, and sums inside a node and across nodes, timed.

Under torchrun, a process per GPU. Inside: the ranks of a node, over NVLink. Across: the ranks of equal place on all
nodes, as many sums at once as a node has GPUs, over the network. Without GPUs everything is small, and no floor holds.
"""

import faulthandler
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from rich.table import Table

from data_tools.files import write_durably
from launch.preflight.findings import FABRIC, Finding, console, setting
from pretrain.metrics import peak_tflops
from pretrain.parallel.mesh import Mesh, init_mesh

# A group's in-place sum of a vector over its ranks; returns what to wait for.
Sum = Callable[[torch.Tensor], Any]

LIMIT_SECONDS = 110  # then each rank prints where it hangs, and ends
SHARE_OF_PEAK = 0.5  # of the data sheet's: a sound GPU reaches two thirds
ALLREDUCE_GB_S = 5.0  # by default on GPUs: what falls back to a management network has 1


@dataclass(frozen=True)
class Sizes:
    """Of a square matrix and of a summed vector, and how often each is timed."""

    matrix: int
    products: int
    vector: int
    sums: int


# A GPU is raised out of its idle clocks by a third of a second of products, and timed for another.
SIZES = {"cuda": Sizes(8192, 200, 1 << 26, 20), "cpu": Sizes(256, 3, 1 << 16, 3)}


@dataclass(frozen=True)
class RankFigures:
    """What a rank measured; None where its group is itself alone. `wrong`: sums that are not right."""

    rank: int
    node: str
    device: str
    matmul_tflops: float
    inside_gb_s: float | None
    across_gb_s: float | None
    wrong: list[str]


@dataclass(frozen=True)
class Floors:
    """What each figure must reach; None: any will do."""

    matmul_tflops: float | None
    allreduce_gb_s: float | None

    @classmethod
    def on(cls, device: torch.device) -> "Floors":
        """The environment's, else half of a known GPU's peak and a network that is no management network."""
        peak = peak_tflops(None)
        matmul = setting("MIN_MATMUL_TFLOPS", SHARE_OF_PEAK * peak if peak else 0)
        allreduce = setting("MIN_ALLREDUCE_GB_S", ALLREDUCE_GB_S if device.type == "cuda" else 0)
        return cls(matmul or None, allreduce or None)


def measure_and_report(path: Path) -> int:
    """Rank 0 prints the table and writes the report; 1 on every rank where a floor does not hold or a sum is wrong."""
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    # Neighbouring ranks share a node: mesh's tensor groups are then nodes, its data groups go across.
    with init_mesh(int(os.environ.get("LOCAL_WORLD_SIZE", 1))) as mesh:
        floors = Floors.on(mesh.device)
        ranks: list[RankFigures] = mesh.gather_objects(measure(mesh))
        findings = judge(ranks, floors)
        if mesh.rank == 0:
            _show(ranks, floors, findings)
            path.parent.mkdir(parents=True, exist_ok=True)
            report = {"findings": findings, "floors": floors, "ranks": ranks}
            write_durably(path, orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    faulthandler.cancel_dump_traceback_later()
    return 1 if any(finding.level == "bad" for finding in findings.values()) else 0


def measure(mesh: Mesh) -> RankFigures:
    """Time this rank's GPU alone, then its groups with all others."""
    device = mesh.device
    tflops = _matmul_tflops(device)
    inside, across = mesh.tensor_group.allreduce, mesh.data_group.allreduce
    wrong = []
    if not _sum_is_right(inside, mesh.tensor_rank, mesh.tensor_size, device):
        wrong.append("the sum inside the node is wrong")
    if not _sum_is_right(across, mesh.data_rank, mesh.data_size, device):
        wrong.append("the sum across nodes is wrong")
    return RankFigures(
        rank=mesh.rank,
        node=os.environ.get("SLURMD_NODENAME") or platform.node(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        matmul_tflops=tflops,
        inside_gb_s=_allreduce_gb_s(inside, mesh.tensor_size, device),
        across_gb_s=_allreduce_gb_s(across, mesh.data_size, device),
        wrong=wrong,
    )


def _matmul_tflops(device: torch.device) -> float:
    size, count = SIZES[device.type].matrix, SIZES[device.type].products
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: torch.matmul(a, b), device, count, uncounted=count) / 1e12


def _sum_is_right(add_up: Sum, place: int, size: int, device: torch.device) -> bool:
    values = torch.full((SIZES[device.type].vector,), float(place + 1), device=device)
    add_up(values).wait()
    return bool((values == size * (size + 1) / 2).all())


def _allreduce_gb_s(add_up: Sum, size: int, device: torch.device) -> float | None:
    """What each rank sends per second, and receives: 2 (n - 1) / n of the vector; None in a group of one."""
    if size == 1:
        return None
    values = torch.zeros(SIZES[device.type].vector, device=device)
    seconds = _seconds(lambda: add_up(values).wait(), device, SIZES[device.type].sums, uncounted=3)
    return 2 * (size - 1) / size * values.nbytes / seconds / 1e9


def _seconds(work: Callable[[], object], device: torch.device, count: int, uncounted: int) -> float:
    """Of one of `count` calls, on average, after some that are not counted."""
    for repeats in (uncounted, count):
        _wait_for(device)
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        _wait_for(device)
    return (time.perf_counter() - started) / count


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judge(ranks: list[RankFigures], floors: Floors) -> dict[str, Finding]:
    """Of each node.

    A sum across nodes is as slow as its slowest member, and does not say which that is: all are bad, unless one has
    another problem, which then explains it.
    """
    own: dict[str, list[str]] = {rank.node: [] for rank in ranks}
    across: dict[str, list[str]] = {rank.node: [] for rank in ranks}
    for rank in ranks:
        own[rank.node] += [f"rank {rank.rank}: {problem}" for problem in _own_problems(rank, floors)]
        if _below(rank.across_gb_s, floors.allreduce_gb_s):
            across[rank.node].append(
                f"rank {rank.rank}: {rank.across_gb_s:.2f} GB/s across nodes, needs {floors.allreduce_gb_s:g} "
                "(MIN_ALLREDUCE_GB_S)"
            )
    problems = own if any(own.values()) else across
    return {node: Finding.of(FABRIC, found, "all floors hold") for node, found in problems.items()}


def _own_problems(rank: RankFigures, floors: Floors) -> list[str]:
    found = list(rank.wrong)
    if _below(rank.matmul_tflops, floors.matmul_tflops):
        found.append(
            f"{rank.matmul_tflops:.3g} TFLOP/s in a matrix product, needs {floors.matmul_tflops:g} (MIN_MATMUL_TFLOPS)"
        )
    if _below(rank.inside_gb_s, floors.allreduce_gb_s):
        found.append(
            f"{rank.inside_gb_s:.2f} GB/s inside the node, needs {floors.allreduce_gb_s:g} (MIN_ALLREDUCE_GB_S)"
        )
    return found


def _below(figure: float | None, floor: float | None) -> bool:
    # Not `figure < floor`: a NaN is to be below.
    return figure is not None and floor is not None and not figure >= floor


def _show(ranks: list[RankFigures], floors: Floors, findings: dict[str, Finding]) -> None:
    out, table = console(), Table("rank", "node", "device", "TFLOP/s", "GB/s inside", "GB/s across", box=None)
    figures = [(rank.matmul_tflops, rank.inside_gb_s, rank.across_gb_s) for rank in ranks]
    slowest = [min((f for f in column if f is not None), default=None) for column in zip(*figures, strict=True)]
    for rank, row in zip(ranks, figures, strict=True):
        table.add_row(str(rank.rank), rank.node, rank.device, *map(_cell, row, slowest))
    out.print(table)
    out.print(f"floors: {_floor(floors.matmul_tflops)} TFLOP/s, {_floor(floors.allreduce_gb_s)} GB/s")
    for node, finding in findings.items():
        if finding.level != "ok":
            out.print(f"{node}: {finding.detail}", soft_wrap=True)
    if bad := [node for node, finding in findings.items() if finding.level == "bad"]:
        print(f"bad nodes: {','.join(bad)}", flush=True)


def _cell(figure: float | None, slowest: float | None) -> str:
    if figure is None:
        return "–"
    return f"{figure:.3f}" + (" slowest" if figure == slowest else "")


def _floor(value: float | None) -> str:
    return "no" if value is None else f"{value:g}"

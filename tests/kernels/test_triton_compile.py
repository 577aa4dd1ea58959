"""The Triton kernels compile for sm_80 and sm_90, without spilling registers, on a machine with no GPU.

`kernels.benchmarks.compiled` runs in fresh processes, one per target: other tests may have switched Triton's
interpreter on.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kernels.benchmarks.compiled import innermost_loops
from kernels.benchmarks.launches import LAUNCHES

ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 90)
# Instructions for 32 (channel, token) pairs at N = 16 in bf16 on sm_90; Longhorn's are the project's targets.
CEILINGS = {
    ("scan", "forward_kernel"): 130,
    ("scan exact", "forward_kernel"): 130,
    ("scan packed", "forward_kernel"): 130,
    ("scan exact packed", "forward_kernel"): 130,
    ("scan long", "forward_kernel"): 130,
    ("scan", "backward_kernel"): 600,
    ("scan exact", "backward_kernel"): 600,
    ("scan packed", "backward_kernel"): 600,
    ("scan exact packed", "backward_kernel"): 600,
    ("scan long", "backward_kernel"): 600,
    ("selective scan", "forward_kernel"): 160,
    ("selective scan", "backward_kernel"): 620,
}
SCAN_ON_CPU = """
import torch
from kernels.longhorn_scan import longhorn_scan
x = torch.zeros(1, 1, 1)
longhorn_scan(x, x, x, x, backend="triton")
"""

Tables = dict[str, list[dict[str, Any]]]  # launch -> its kernels


def run(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Future]]:
    command = ["-m", "kernels.benchmarks.compiled", "--json", "--capability"]
    with ThreadPoolExecutor(len(CAPABILITIES)) as pool:
        yield {c: pool.submit(run, [*command, str(c)], tmp_path_factory.mktemp("triton")) for c in CAPABILITIES}


@pytest.fixture
def compiled(children: dict[int, Future], capability: int) -> Tables:
    child = children[capability].result()
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)[str(capability)]


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_spills(compiled: Tables, capability: int, launch: str) -> None:
    assert compiled[launch]
    for kernel in compiled[launch]:
        assert kernel["spilled"] == 0, kernel
        assert 0 < kernel["registers"] <= 255, kernel


@pytest.mark.parametrize("capability", [90])
def test_walks_stay_under_their_ceilings(compiled: Tables, capability: int) -> None:
    measured = {}
    for (launch, name), ceiling in CEILINGS.items():
        [kernel] = [kernel for kernel in compiled[launch] if kernel["kernel"] == name]
        measured[launch, name] = kernel["per_32_pairs"]
        print(f"{launch:22} {name:16} {kernel['registers']:4} registers {measured[launch, name]:6.1f} of {ceiling}")
    over = {key: count for key, count in measured.items() if not count <= CEILINGS[key]}
    assert not over, over


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("launch", ["scan", "scan exact", "scan packed", "scan long", "selective scan"])
def test_walks_know_no_shared_memory_and_no_barrier(compiled: Tables, capability: int, launch: str) -> None:
    for kernel in compiled[launch]:
        if kernel["per_32_pairs"] is not None:
            opcodes = {opcode for loop in kernel["loops"] for opcode in loop}
            assert kernel["shared"] == 0
            assert not opcodes & {"BAR", "LDS", "STS", "STSM", "LDSM", "LDL", "STL"}, opcodes


def test_cpu_tensors_are_refused(tmp_path: Path) -> None:
    child = run(["-c", SCAN_ON_CPU], tmp_path)
    assert child.returncode != 0
    assert "ValueError: backend 'triton' needs CUDA tensors, u is on cpu; use backend 'cpu'" in child.stderr


def test_loops_are_read_off_machine_code() -> None:
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
    .L_x_1:
        /*0010*/                   FFMA R2, R2, R3, R4 ;
    .L_x_0:
        /*0020*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0030*/                   FFMA R2, R2, R3, R4 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/               @P2 BRA `(.L_x_1) ;
    .L_x_2:
        /*0060*/                   BRA `(.L_x_2);
    """
    loops = innermost_loops(sass)
    assert [loop.instructions for loop in loops] == [3]
    assert dict(loops[0].opcodes) == {"LDG": 1, "FFMA": 1, "BRA": 1}

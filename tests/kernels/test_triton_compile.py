"""The Triton kernels compile for sm_90, without spilling registers, on a machine with no GPU.

The host code runs as it would on one, but each launch stops after compiling. That happens in a
fresh process: other tests may have imported triton under its interpreter.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CASES = {
    "diagonal": {},
    "exact": {"update": "exact"},
    "packed": {"packed": True},
    "exact packed": {"update": "exact", "packed": True},
    "no optional inputs": {"optional": False},
    # Triton compiles arguments that are 1 into the kernel.
    "smallest": {"B": 1, "L": 1, "D": 1, "N": 1, "update": "exact"},
    "odd sizes": {"L": 7, "D": 19, "N": 5, "dtype": "float32"},
}
SCAN_ON_CPU = """
import torch
from kernels.longhorn_scan.triton import triton_scan
x = torch.zeros(1, 1, 1)
triton_scan(x, x, x, x, None, None, None, None, None, "diagonal")
"""


def run(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def usage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, int]]]:
    """Resources by case and kernel, as cuobjdump names them."""
    child = run([__file__], tmp_path_factory.mktemp("triton"))
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(usage: dict[str, dict[str, dict[str, int]]], case: str) -> None:
    assert set(usage[case]) == {"forward_kernel", "backward_kernel"}
    for kernel, resources in usage[case].items():
        assert resources["STACK"] == 0, (kernel, resources)
        assert 0 < resources["REG"] <= 255, (kernel, resources)


def test_cpu_tensors_are_refused(tmp_path: Path) -> None:
    child = run(["-c", SCAN_ON_CPU], tmp_path)
    assert child.returncode != 0
    assert "ValueError: backend 'triton' needs CUDA tensors, u is on cpu; use backend 'cpu'" in child.stderr


def compile_case(
    B: int = 2,
    L: int = 64,
    D: int = 256,
    N: int = 16,
    dtype: str = "bfloat16",
    update: str = "diagonal",
    packed: bool = False,
    optional: bool = True,
) -> dict[str, dict[str, int]]:
    """Resources of both kernels for one set of arguments."""
    import torch

    import kernels.longhorn_scan.triton as module

    class CompileOnly:
        """Stands for a kernel; a launch compiles it for its arguments."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel
            self.compiled: Any = None

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                self.compiled = self.kernel.warmup(*args, grid=grid, **kwargs)

            return launch

    names = ("forward_kernel", "backward_kernel")
    originals = {name: getattr(module, name) for name in names}
    kernels = {name: CompileOnly(kernel) for name, kernel in originals.items()}
    vars(module).update(kernels)
    try:
        B = 1 if packed else B
        stream, state = {"dtype": getattr(torch, dtype), "requires_grad": True}, {"requires_grad": True}
        u, dt, z = (torch.zeros(B, L, D, **stream) for _ in range(3))
        q, k = (torch.zeros(B, L, N, **stream) for _ in range(2))
        optionals = [torch.zeros(D, **state), torch.zeros(D, **state), z, torch.zeros(B, D, N, **state)]
        bounds = torch.tensor([0, L], dtype=torch.int32) if packed else None
        if not optional:
            optionals = [None] * 4
        out, final = module.triton_scan(u, dt, q, k, *optionals, bounds, update)
        (out.sum() + final.sum()).backward()
    finally:
        vars(module).update(originals)
    return {name: resources_of(kernel.compiled.asm["cubin"]) for name, kernel in kernels.items()}


def resources_of(cubin: bytes) -> dict[str, int]:
    """Registers (REG), spilled bytes (STACK) and more per thread, read by Triton's own cuobjdump."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def pretend_sm90() -> None:
    """Give Triton a driver that names a GPU and never touches one."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(Driver())


if __name__ == "__main__":
    pretend_sm90()
    print(json.dumps({name: compile_case(**case) for name, case in CASES.items()}))

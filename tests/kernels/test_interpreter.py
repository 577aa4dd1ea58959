"""The tests in tests/kernels/gpu, each file in a fresh process under Triton's interpreter, two at a time."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "gpu").glob("test_*.py"))


def run_interpreted(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[Path, Future[subprocess.CompletedProcess[str]]]]:
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {file: pool.submit(run_interpreted, file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_passes_under_the_interpreter(
    file: Path, runs: dict[Path, Future[subprocess.CompletedProcess[str]]]
) -> None:
    child = runs[file].result()
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout
    print(child.stdout.splitlines()[-1])

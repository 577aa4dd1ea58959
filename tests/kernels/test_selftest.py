"""The self-test itself: it passes here, what is broken is caught and named, and a pass is remembered while it holds."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels import selftest
from kernels.cpp import cache_dir
from kernels.rms_norm import cpu as norm
from kernels.selftest import __main__ as command
from kernels.selftest import record
from kernels.selftest.cases import all_cases

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of records of this test's own, beside the compiled libraries of all."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    (tmp_path / "cpp").symlink_to(cache_dir())
    monkeypatch.setenv("LONGHORN_CACHE", str(tmp_path))
    return tmp_path / "selftest"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but RMSNorm is tested."""
    cases = [case for case in all_cases() if case.op == "rms_norm"]
    monkeypatch.setattr(selftest, "all_cases", lambda: cases)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_all_ops_pass_here_and_are_not_tested_twice(records: Path) -> None:
    """The C++ kernels, and Triton's under the interpreter."""
    first = run("-m", "kernels.selftest")
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.findall(r"^(\w+) kernels on", first.stdout, re.MULTILINE) == ["cpu", "triton"]
    for backend in first.stdout.split("triton kernels"):
        tested = {line.split()[0] for line in backend.splitlines() if line.endswith(" ok")}
        assert tested >= {case.op for case in all_cases()}
    assert "WRONG" not in first.stdout and not first.stderr
    again = run("-m", "kernels.selftest")
    assert again.returncode == 0
    assert again.stdout.count("with this software and code; --fresh tests again") == 2, again.stdout


def test_every_backend_of_every_op_is_tested() -> None:
    """The packages that hold ops, and their decode steps, by their public names.

    Not attention and gla: on a GPU those run torch's kernels or other packages', which their own tests run there.
    """
    packages = {init.parent.name for init in (ROOT / "kernels").glob("*/__init__.py")}
    tested = {case.op.removeprefix("linear_") for case in all_cases()}
    assert tested >= packages - {"benchmarks", "scan", "selftest", "attention", "gla"}
    assert {"longhorn_step", "selective_step", "causal_conv1d_step"} <= tested


# ---- what is broken is named -------------------------------------------------------------------------------
def spoiled(backward: Callable, factor: float) -> Callable:
    """An RMSNorm's backward whose last gradient, weight's, is off by a factor in one channel."""

    def wrong(*arguments: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        dx, dresidual, dweight = backward(*arguments)
        dweight[dweight.abs().argmax()] *= factor
        return dx, dresidual, dweight

    return wrong


@pytest.mark.parametrize(("factor", "error"), [(1.001, "1.0e-03"), (float("nan"), "nan")])
def test_a_broken_kernel_is_caught_and_named(
    records: Path,
    few: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    factor: float,
    error: str,
) -> None:
    monkeypatch.setattr(norm, "backward", spoiled(norm.backward, factor))
    assert command.main(["--backend", "cpu"]) == 1
    table = capsys.readouterr().out
    [row] = [line for line in table.splitlines() if line.startswith("rms_norm") and "as in training" in line]
    assert f"fp32 gradient of weight {error} 2.0e-05" in " ".join(row.split())
    assert row.endswith("WRONG at tokens 133, d_model 2048")
    assert "0 of 3 right" in table
    with pytest.raises(selftest.SelfTestError) as caught:
        selftest.require(CPU, say=lambda line: None)
    message = str(caught.value)
    assert "rms_norm (as in training, fp32, tokens 133, d_model 2048) is wrong" in message
    assert f"gradient of weight is off by {error} of its largest value, 2.0e-05 is allowed" in message
    assert "python -m kernels.selftest --fresh" in message
    assert not list(records.glob("*"))


def test_an_op_that_raises_is_wrong(
    records: Path, few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(norm, "forward", fail)
    assert command.main(["--backend", "cpu"]) == 1
    assert "    RuntimeError: an illegal memory access was encountered" in capsys.readouterr().out
    with pytest.raises(selftest.SelfTestError, match=r"rms_norm .* raised RuntimeError: an illegal memory access"):
        selftest.require(CPU, say=lambda line: None)


def test_a_broken_triton_kernel_is_caught(records: Path) -> None:
    """One program's share of the rows left out, as a wrong grid would."""
    script = (
        "import sys; from kernels.rms_norm import triton; from kernels.selftest.__main__ import main\n"
        "cdiv = triton.triton.cdiv; triton.triton.cdiv = lambda a, b: max(cdiv(a, b) - 1, 1)\n"
        "sys.exit(main(['--backend', 'triton', '--only', 'rms_norm', '--device', 'cpu']))"
    )
    broken = run("-c", script, TRITON_INTERPRET="1")
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "WRONG at tokens 19, d_model 256" in broken.stdout


# ---- what has passed is remembered -------------------------------------------------------------------------
def test_a_pass_is_recorded_once_and_asked_for_again_when_it_no_longer_holds(
    records: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    selftest.require(CPU, say=heard.append)
    assert len(heard) == 2 and "self-test passed: 3 checks" in heard[1]
    [path] = records.glob("*")
    written = json.loads(path.read_text())
    assert written["identity"]["torch"] == torch.__version__ and "commit" in written

    selftest.require(CPU, say=heard.append)
    assert len(heard) == 2  # a hit is silent
    for corrupt in ("", "{", "[]", "{}", json.dumps(written | {"identity": {"backend": "cpu"}})):
        path.write_text(corrupt)
        selftest.require(CPU, say=heard.append)
        assert json.loads(path.read_text())["identity"] == written["identity"]
    assert len(heard) == 12
    monkeypatch.setattr(record, "code_hash", lambda folder: "another")
    selftest.require(CPU, say=heard.append)
    assert len(heard) == 14 and len(list(records.glob("*"))) == 2


def test_a_part_is_no_pass(records: Path) -> None:
    assert command.main(["--backend", "cpu", "--only", "rms_norm"]) == 0
    assert not records.exists()


def test_a_pass_that_cannot_be_written_is_still_one(
    records: Path, few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record, "write_json", refuse)
    heard: list[str] = []
    selftest.require(CPU, say=heard.append)
    assert any("Permission denied" in line for line in heard) and "passed" in heard[-1]
    assert command.main(["--backend", "cpu"]) == 0
    assert "Permission denied" in capsys.readouterr().err


def test_each_gpu_of_a_node_has_its_own_record(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(name="NVIDIA H100", major=9, minor=0, uuid=f"GPU-{device.index}")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    first, second, same = (record.identity("triton", torch.device("cuda", i)) for i in (0, 1, 0))
    assert first != second and first == same
    assert {"triton", "torch", "cuda", "driver", "capability", "code"} <= first.keys()


def test_code_is_known_by_its_sources(tmp_path: Path) -> None:
    (tmp_path / "op").mkdir()
    seen = {record.code_hash(tmp_path)}
    for name, text in [("op/a.py", "x"), ("op/a.py", "y"), ("op/b.h", ""), ("c.cpp", "y")]:
        (tmp_path / name).write_text(text)
        seen.add(record.code_hash(tmp_path))
    (tmp_path / "c.cpp").rename(tmp_path / "d.cpp")
    seen.add(record.code_hash(tmp_path))
    assert len(seen) == 6
    (tmp_path / "op/a.pyc").write_text("compiled")
    assert record.code_hash(tmp_path) in seen


# ---- the command's arguments -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "torch finds no GPU here"),
        (["--backend", "gpu"], "invalid choice: 'gpu'"),
        (["--only", "rms_nrom"], "invalid choice: 'rms_nrom'"),
        (["--backend", "triton"], "triton is not installed; --backend cpu tests without it"),
    ],
)
def test_wrong_arguments_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_cpu_backend_is_not_for_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--backend", "cpu"])
    assert stopped.value.code == 2
    assert "add --device cpu" in capsys.readouterr().err

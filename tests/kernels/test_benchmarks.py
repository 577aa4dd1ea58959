"""The benchmark runner: what it checks, computes, records and refuses. No test looks at a real time."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.benchmarks import __main__ as command
from kernels.benchmarks import record, runner
from kernels.benchmarks.cases import Bar, Case, Variant, cases_for
from kernels.benchmarks.timing import Lap, Times, take_turns

CPU = torch.device("cpu")


def square(x: Tensor) -> Tensor:
    return x * x


def make_case(**variants: Variant) -> Case:
    return Case(
        "squares",
        lambda shape, generator: {"x": torch.randn(shape["n"], 2, generator=generator)},
        {"n": 3},
        {"n": 5},
        {"plain": Variant(square, square), **variants},
        baseline="plain",
    )


@pytest.mark.parametrize("name", cases_for(CPU))
def test_every_variant_is_right_on_the_small_shape(name: str) -> None:
    case = cases_for(CPU)[name]
    assert {case.baseline}.union(*((bar.faster, bar.slower) for bar in case.bars)) <= case.variants.keys()
    assert all(runner.check(case, variant, CPU) > 0 for variant in case.variants)  # 0: checked with itself


def test_the_torch_variant_does_not_use_the_compiled_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.longhorn_scan.cpu_cpp._call", lambda *_: pytest.fail("C++ was called"))
    case = cases_for(CPU)["longhorn_scan"]
    assert runner.check(case, "torch", CPU) < 1e-5
    with pytest.raises(pytest.fail.Exception, match=r"C\+\+ was called"):
        runner.check(case, "C++", CPU)


def test_a_wrong_gradient_stops_the_run_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "take_turns", lambda *_: pytest.fail("timed a wrong variant"))
    half = make_case(half=Variant(lambda x: 0.5 * square(x) + 0.5 * square(x).detach(), square))
    with pytest.raises(runner.WrongResult, match=r"variant 'half': the gradient of x is off by [45]"):
        runner.run_case(half, 1, CPU)
    nan = make_case(nan=Variant(lambda x: x * float("nan"), square))
    with pytest.raises(runner.WrongResult, match="variant 'nan': the output is off by nan"):
        runner.run_case(nan, 1, CPU)


def test_variants_take_turns_and_threads_are_restored() -> None:
    calls: list[str] = []

    def run(name: str, lap: Lap) -> None:
        calls.append(name)
        lap("all")

    times = take_turns({name: partial(run, name) for name in "ab"}, 2, CPU, warmup=1)
    assert calls == ["a", "b"] * 3
    assert [len(times[name].phases["all"]) for name in "ab"] == [2, 2]

    before, seen = torch.get_num_threads(), set()

    def spy(x: Tensor) -> Tensor:
        seen.add(torch.get_num_threads())
        return square(x)

    runner.run_case(make_case(spy=Variant(spy, square, threads=before + 1)), 1, CPU)
    assert (seen, torch.get_num_threads()) == ({before + 1}, before)


def test_ratios_are_of_medians_of_whole_runs() -> None:
    case = replace(make_case(fast=Variant(square, square)), bars=(Bar("fast", "plain", 4), Bar("fast", "plain", 4.1)))
    times = {
        "plain": Times({"forward": [1.0, 3.0, 50.0], "backward": [9.0, 5.0, 1.0]}),
        "fast": Times({"forward": [1.0, 1.0, 7.0], "backward": [1.0, 1.5, 1.0]}),
    }
    result = runner.Result(case, {"plain": 0.0, "fast": 1.23456e-7}, times)
    assert times["plain"].totals == [10.0, 8.0, 51.0]
    assert result.speedup("fast", "plain") == 10.0 / 2.5
    recorded = result.to_dict()
    assert [bar["met"] for bar in recorded["bars"]] == [True, False]
    assert recorded["variants"]["fast"] == {
        "dtype": "float32",
        "threads": 1,
        "max_relative_error": 1.2e-7,
        "speedup_over_baseline": 4.0,
        "median_ms": 2.5,
        "min_ms": 2.0,
        "median_ms_by_phase": {"forward": 1.0, "backward": 1.0},
        "all_ms": [2.0, 2.5, 8.0],
    }


@pytest.mark.parametrize(("ratio", "arguments", "code"), [(1e9, [], 0), (1e9, ["--check"], 1), (0, ["--check"], 0)])
def test_command_records_and_checks(
    ratio: float,
    arguments: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = replace(make_case(other=Variant(square, square)), bars=(Bar("other", "plain", ratio),))
    monkeypatch.setattr(command, "cases_for", lambda device: {"squares": case})
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert command.main(["squares", "--repeats", "3", "--output", str(tmp_path / "new"), *arguments]) == code
    assert ("bar missed" if ratio else "bar met") in capsys.readouterr().out

    (file,) = (tmp_path / "new").iterdir()  # and no temporary file
    assert file.name == f"squares-{record.hardware_slug(CPU)}.json"
    recorded = json.loads(file.read_text())
    assert recorded["versions"]["torch"] == torch.__version__
    assert recorded["environment"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert recorded["hardware"]["cores"] >= 1
    assert recorded["commit"] is None or len(recorded["commit"]["hash"]) == 40
    assert len(recorded["variants"]["other"]["all_ms"]) == recorded["repeats"] == 3


def test_command_reports_a_wrong_variant_and_records_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = make_case(wrong=Variant(lambda x: x, square))
    monkeypatch.setattr(command, "cases_for", lambda device: {"squares": case})
    assert command.main(["--output", str(tmp_path)]) == 1
    assert "squares: variant 'wrong'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_names_the_nearest_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["longhorn_scam"])
    assert "no case 'longhorn_scam' on this device; did you mean 'longhorn_scan'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cpu", "slug"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.80GHz", "intel-xeon-2.80ghz-2-cores"),
        ("AMD EPYC 7B13 64-Core Processor", "amd-epyc-7b13-64-core-2-cores"),
    ],
)
def test_hardware_slug(cpu: str, slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_cpu_model", lambda: cpu)
    monkeypatch.setattr(record.os, "cpu_count", lambda: 2)
    assert record.hardware_slug(CPU) == slug

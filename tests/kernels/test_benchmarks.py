"""The benchmark runner: what it checks, computes, records and refuses. No test looks at a real time."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels.benchmarks import __main__ as command
from kernels.benchmarks import record, runner, timing
from kernels.benchmarks.case import Bar, Case, Limit, Variant
from kernels.benchmarks.cases import cpu_cases, cuda_cases
from kernels.benchmarks.timing import Lap, Times, take_turns

CPU = torch.device("cpu")
# Variants of the GPU's cases that compute the same on a CPU. The others run on a GPU only (and, as the ops that they
# are, under Triton's interpreter in tests/kernels/gpu).
ANYWHERE = ("unbind loop", "plain torch", "longhorn_step", "F.conv1d", "F.rms_norm", "all logits", "ours")


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


@pytest.mark.parametrize("name", cpu_cases())
def test_every_variant_is_right_on_the_small_shape(name: str) -> None:
    case = cpu_cases()[name]
    assert all(runner.check(case, variant, CPU) > 0 for variant in case.variants)  # 0: checked with itself


@pytest.mark.parametrize("name", cuda_cases())
def test_variants_of_the_gpu_cases_are_right(name: str) -> None:
    case, device = cuda_cases()[name], CPU
    names = [variant for variant in case.variants if variant in ANYWHERE]
    if torch.cuda.is_available():
        device, names = torch.device("cuda"), [v for v in case.variants if v not in runner.missing_packages(case)]
    assert all(runner.check(case, variant, device) > 0 for variant in names)


@pytest.mark.parametrize("cases", [cpu_cases(), cuda_cases()], ids=["CPU", "GPU"])
def test_cases_name_their_variants(cases: dict[str, Case]) -> None:
    for case in cases.values():
        assert {case.baseline}.union(*(bar.variants for bar in case.bars)) <= case.variants.keys()
        assert case.variants[case.baseline].needs is None
        shapes = [case.shape, case.check_shape, *(v.shape for v in case.variants.values() if v.shape)]
        assert all(shape.keys() == case.shape.keys() for shape in shapes)


def test_the_torch_variant_does_not_use_the_compiled_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.longhorn_scan.cpu_cpp._call", lambda *_: pytest.fail("C++ was called"))
    case = cpu_cases()["longhorn_scan"]
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
    case = make_case(fast=Variant(square, square))
    bars = (Bar("fast", "plain", 4), Bar("fast", "plain", 4.1))
    times = {
        "plain": Times({"forward": [1.0, 3.0, 50.0], "backward": [9.0, 5.0, 1.0]}),
        "fast": Times({"forward": [1.0, 1.0, 7.0], "backward": [1.0, 1.5, 1.0]}),
    }
    traffic = {name: {"forward": 1, "backward": 2} for name in times}
    result = runner.Result(case, {"plain": 0.0, "fast": 1.23456e-7}, times, traffic, bars)
    assert times["plain"].totals == [10.0, 8.0, 51.0]
    assert result.speedup("fast") == 10.0 / 2.5
    recorded = result.to_dict()
    assert [bar["met"] for bar in recorded["bars"]] == [True, False]
    assert recorded["variants"]["fast"] == {
        "dtype": "float32",
        "threads": 1,
        "max_relative_error": 1.2e-7,
        "speedup_over_baseline": 4.0,
        "bytes_by_phase": {"forward": 1, "backward": 2},
        "median_ms": 2.5,
        "min_ms": 2.0,
        "median_ms_by_phase": {"forward": 1.0, "backward": 1.0},
        "all_ms": [2.0, 2.5, 8.0],
    }


def test_a_forward_alone_is_compared_with_a_forward() -> None:
    times = {"both": Times({"forward": [6.0], "backward": [100.0]}), "forward": Times({"forward": [2.0]})}
    assert Bar("forward", "both", 3).measure(times) == 3.0
    assert Bar("both", "forward", 1).measure(times) == 1 / 3


def test_limits_are_of_a_phase_and_hold_on_their_hardware_alone() -> None:
    limits = (Limit("plain", "forward", 1e9, "H100"), Limit("plain", "backward", 0.0, "H100"))
    case = replace(make_case(), bars=limits)
    assert runner.run_case(case, 1, CPU, "NVIDIA H200").bars == ()
    result = runner.run_case(case, 1, CPU, "NVIDIA H100 80GB HBM3")
    assert [result.is_met(bar) for bar in result.bars] == [True, False]
    assert result.to_dict()["bars"][0]["hardware"] == "H100"
    assert "backward takes" in limits[1].describe(result.measure(limits[1]))


def test_a_variant_without_its_package_is_skipped_with_its_bars(capsys: pytest.CaptureFixture[str]) -> None:
    needy = Variant(lambda x: pytest.fail("ran"), square, needs="no_such_package")
    case = replace(make_case(needy=needy), bars=(Bar("plain", "needy", 1),))
    result = runner.run_case(case, 1, CPU)
    assert (result.times.keys(), result.bars) == ({"plain"}, ())
    assert result.to_dict()["skipped"] == {"needy": "No module named 'no_such_package'"}
    command.show("squares", result, command.Console(), copied=1e9)
    assert "skipped 'needy': No module named 'no_such_package'" in capsys.readouterr().out


def test_updates_in_place_are_checked_and_counted() -> None:
    def add(state: Tensor, x: Tensor, amount: float = 1.0) -> tuple[Tensor, Tensor]:
        state += amount * x.to(state.dtype)
        return x, 2 * x

    bf16 = {"dtype": torch.bfloat16, "backward": False}
    case = Case(
        "sums",
        lambda shape, generator: {"state": torch.ones(shape["n"], 2), "x": torch.ones(shape["n"], 2)},
        {"n": 3},
        {"n": 5},
        {"right": Variant(add, add, **bf16), "wrong": Variant(partial(add, amount=2.0), add, **bf16)},
        baseline="right",
        wide=("state",),
        in_place=("state",),
    )
    with pytest.raises(runner.WrongResult, match="variant 'wrong': state afterwards is off by 5.0e-01"):
        runner.run_case(case, 1, CPU)
    result = runner.run_case(replace(case, variants={"right": case.variants["right"]}), 1, CPU)
    assert result.times["right"].phases.keys() == {"forward"}
    assert result.traffic["right"] == {"forward": 6 * (4 + 2 + 4 + 2 * 2)}  # state twice, x, two outputs


def test_traffic_is_every_tensor_once() -> None:
    result = runner.run_case(make_case(), 1, CPU)
    assert result.traffic["plain"] == {"forward": 6 * 4 * 2, "backward": 6 * 4 * 3}  # x, out; x, its gradient, dout


def test_variants_may_have_their_own_shape_and_layout() -> None:
    strides = []

    def spy(x: Tensor) -> Tensor:
        strides.append((tuple(x.shape), x.stride()))
        return x.square()

    variant = Variant(spy, lambda x: x.square(), shape={"n": 7}, time_adjacent=True, backward=False)
    case = Case(
        "squares", lambda shape, _: {"x": torch.ones(2, shape["n"], 3)}, {"n": 4}, {"n": 5}, {"a": variant}, "a"
    )
    runner.run_case(case, 1, CPU)
    assert strides[0] == ((2, 5, 3), (15, 1, 5))
    assert set(strides[1:]) == {((2, 7, 3), (21, 1, 7))}


def test_copy_rate_counts_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COPY_BYTES", 4000)
    monkeypatch.setattr(timing, "take_turns", lambda *_: {"copy": Times({"copy": [0.5, 2.0, 1.0]})})
    assert timing.copy_rate(CPU) == 8000 / 1e-3


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


def test_gpu_record(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def answer(*command: str) -> str | None:
        asked.append(command)
        return "580.1, P0, 1980 MHz" if command[0] == "nvidia-smi" else None

    properties = SimpleNamespace(
        name="H100", major=9, minor=0, total_memory=80, multi_processor_count=132, uuid="1234-5"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(record, "_output", answer)
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    recorded = record.provenance(torch.device("cuda"))
    gpu = recorded["hardware"]["gpu"]
    assert (gpu["capability"], gpu["driver_version"], gpu["clocks.sm"]) == ("9.0", "580.1", "1980 MHz")
    assert any("--id=GPU-1234-5" in command for command in asked)
    assert recorded["commit"] == {"hash": "abc", "dirty": None}  # git said nothing

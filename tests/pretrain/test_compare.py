"""pretrain.compare: curves and ratios with known answers, what is chosen, what is left to do, what is refused."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch
from omegaconf import OmegaConf

from data_tools.dataset import open_dataset
from pretrain.compare.__main__ import main
from pretrain.compare.config import Comparison, load_comparison
from pretrain.compare.curves import Curve, mean_curve, read_curve, token_ratio
from pretrain.compare.pool import Pool, Task, TaskFailed
from pretrain.compare.report import markdown, sentence
from pretrain.compare.results import ModelResult, Perplexity, Results, compare_pair
from pretrain.compare.runs import (
    Run,
    at_edge,
    check_leftovers,
    choose_rates,
    full_runs,
    grid_runs,
    training_task,
)
from pretrain.config import ConfigError, config_to_dict
from pretrain.data import TrainingData
from pretrain.status import write_status

ROOT = Path(__file__).parents[2]
TOKENS = tuple(1000 * n for n in range(1, 41))


def power_law(scale: float, tokens: tuple[int, ...] = TOKENS) -> Curve:
    """A model that learns from `scale` times the tokens what the one of scale 1 does."""
    return Curve(tokens, tuple(2 + 30 * (n / scale) ** -0.5 for n in tokens))


@pytest.mark.parametrize("scale", [1.8, 1.0, 0.5])
def test_the_ratio_of_a_model_that_needs_so_many_times_the_tokens_is_that(scale: float) -> None:
    found = token_ratio(power_law(1.0), power_law(scale))
    assert found.ratio == pytest.approx(scale, rel=1e-3)
    assert found.loss == max(power_law(1.0).final, power_law(scale).final)
    assert found.bound == ""


def test_the_lowest_loss_so_far_counts_and_is_joined_over_the_logarithm_of_tokens() -> None:
    curve = Curve((100, 400, 800, 1600), (5.0, 3.0, 4.0, 2.0))
    assert curve.tokens_to(5.5) == 100
    assert curve.tokens_to(4.0) == pytest.approx(200)  # halfway from 100 to 400 in the logarithm
    assert curve.tokens_to(3.0) == pytest.approx(400)
    assert curve.tokens_to(2.5) == pytest.approx(math.sqrt(800 * 1600))  # from 3.0 at 800, not from 4.0
    assert curve.tokens_to(1.9) is None


def test_a_loss_that_one_never_reaches_gives_way_to_the_one_that_both_do() -> None:
    worse, better = Curve((100, 200), (4.0, 3.0)), Curve((100, 200), (3.5, 2.0))
    assert token_ratio(better, worse).loss == 3.0
    assert token_ratio(better, worse).ratio == pytest.approx(200 / (100 * 2 ** (1 / 3)))
    assert token_ratio(worse, better).ratio == pytest.approx(100 * 2 ** (1 / 3) / 200)


def test_a_curve_that_begins_below_the_loss_bounds_the_ratio() -> None:
    fast, slow = Curve((100, 200), (2.5, 2.0)), Curve((100, 200), (4.0, 3.0))
    found = token_ratio(fast, slow)
    assert (found.ratio, found.bound) == (pytest.approx(2.0), ">")
    assert (token_ratio(slow, fast).ratio, token_ratio(slow, fast).bound) == (pytest.approx(0.5), "<")
    assert token_ratio(Curve((100,), (2.0,)), Curve((100,), (3.0,))).bound == "?"


def test_curves_are_read_from_metrics_and_averaged_point_by_point(tmp_path: Path) -> None:
    lines: list[dict[str, float | None]] = [
        {"step": 1, "loss": 9.0},
        {"step": 5, "validation_loss": 4.0},
        {"step": 7, "validation_loss": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(x) + b"\n" for x in lines))
    curve = read_curve(tmp_path, 64)
    assert curve == Curve((320, 448), (4.0, 3.0))
    assert mean_curve([curve, Curve((320, 448), (5.0, 3.5))]).losses == (4.5, 3.25)
    with pytest.raises(ValueError, match="different tokens"):
        mean_curve([curve, Curve((320, 449), (5.0, 3.5))])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(orjson.dumps({"step": 9, "validation_loss": math.nan}) + b"\n")
    assert read_curve(tmp_path, 64).losses == (4.0, 3.0, math.inf)  # not passed over


# ---- the comparison's config ---------------------------------------------------------------------


@pytest.fixture
def write(shard, tmp_path: Path) -> Callable[..., Path]:  # type: ignore[no-untyped-def]
    """Writes a training config and a comparison of it, changed by its arguments; returns the latter."""
    base = {
        "model": {"vocab_size": 512, "d_model": 64, "n_layer": 1},
        "data": {"train": shard.prefix, "valid": shard.prefix, "seqlen": 16},
        "optim": {"lr": 1e-2, "min_lr": 1e-3},
        "train": {"global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "threads": 1},
        "eval": {"tokens": 256},
    }
    OmegaConf.save(OmegaConf.create(base), tmp_path / "base.yaml")

    def write(**changes: object) -> Path:
        comparison = {
            "run_dir": str(tmp_path / "compare"),
            "config": str(tmp_path / "base.yaml"),
            "models": {
                "longhorn": {},
                "exact": {"overrides": ["model.mixer.update=exact"]},
                "llama": {"overrides": ["model.mixer.name=attention", "model.d_ff=64"]},
            },
            "learning_rates": [0.01, 0.02],
            "lr_tokens": 320,
            "total_tokens": 640,
            "seeds": [1, 2],
            "validations": 5,
            "contexts": [16, 64],
            "evaluated_tokens": 256,
            "workers": 2,
            "parameter_tolerance": 0.5,
        }
        OmegaConf.save(OmegaConf.create(comparison | changes), tmp_path / "compare.yaml")
        return tmp_path / "compare.yaml"

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": [0.01]}, "compare.yaml: unknown key 'learning_rate'; did you mean 'learning_rates'?"),
        ({"models": {"a": {}, "b": {"override": []}}}, "models.b.override'; did you mean 'overrides'?"),
        ({"models": {"a": {}, "b": {"overrides": ["model.n_layers=2"]}}}, "models.b: command line: unknown key"),
        ({"models": {"a": {}, "b/c": {}}}, "'b/c' can't name a folder"),
        ({"models": {"a": {}}}, "a comparison has two or more, got 1"),
        ({"config": ""}, "models.longhorn.config is not set, nor is config"),
        ({"seeds": [1, 1]}, "seeds must be a list of one or more, each once; got [1, 1]"),
        ({"seeds": ["x"]}, "compare.yaml: seeds[0]: "),
        ({"contexts": [16, 24]}, "contexts: 16 does not divide the largest, 24"),
        ({"lr_tokens": 641}, "lr_tokens=641 is above total_tokens=640"),
        ({"learning_rates": [0.0]}, "0.0 is no learning rate"),
        ({"reference": "mamba"}, "reference: 'mamba' is not one of longhorn, exact, llama"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"parameter_tolerance": 0.001}, "models.llama has "),
        ({"models": {"a": {}, "b": {"overrides": ["data.seqlen=32"]}}}, "models.b: data is "),
        ({"models": {"a": {}, "b": {"overrides": ["train.global_batch_size=8"]}}}, "train.global_batch_size is 8, a's"),
        ({"models": {"a": {}, "b": {"overrides": ["optim.min_lr=0"]}}}, "models.b: its learning rate falls to 0 of"),
        ({"overrides": ["data.valid=''"]}, "data.valid is not set"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(
    write: Callable[..., Path], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_comparison(write(**changes))


def test_a_plan_counts_the_runs_and_starts_none(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write()), "--plan", "seeds=[1,2,3]"]) == 0
    said = capsys.readouterr().out
    assert "6 trainings of 320 tokens" in said
    assert "9 trainings of 640 tokens: seeds [1, 2, 3]" in said
    assert "7,680 tokens" in said  # 3 models × (2 × 320 + 3 × 640)
    assert not (tmp_path / "compare").exists()
    assert main([str(tmp_path / "none.yaml")]) == 2


def test_the_shipped_comparisons_are_of_matched_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    demo, large = (load_comparison(f"launch/configs/compare_{name}.yaml") for name in ("demo", "125m"))
    mixers = ["longhorn", "longhorn", "mamba", "gla", "attention"]
    for comparison in (demo, large):
        assert [base.model.mixer.name for base in comparison.bases.values()] == mixers
        assert len(comparison.config.seeds) == 2
    assert set(demo.parameters.values()) == {4_487_424, 4_552_960, 4_484_096, 4_458_752}


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def comparison(write: Callable[..., Path]) -> Comparison:
    return load_comparison(write())


def finish(run: Run, loss: float) -> None:
    """Leave what a finished training leaves: config.yaml, losses, DONE."""
    run.folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config_to_dict(run.config)), run.folder / "config.yaml")
    (run.folder / "metrics.jsonl").write_bytes(orjson.dumps({"step": 10, "validation_loss": loss}) + b"\n")
    (run.folder / "DONE").touch()


def diverge(run: Run) -> None:
    write_status(run.folder, "not_finite", 3, 192, "steps 1 to 3 updated nothing")


def test_every_model_has_the_same_grid_seeds_and_schedule_shape(comparison: Comparison) -> None:
    grid = grid_runs(comparison)
    assert [(run.model, run.lr) for run in grid] == [(m, lr) for m in comparison.bases for lr in (0.01, 0.02)]
    assert {(run.seed, run.tokens, run.config.total_steps) for run in grid} == {(1, 320, 5)}
    assert [run.config.optim.min_lr for run in grid[:2]] == [0.001, 0.002]  # a tenth, as in the training config
    full = full_runs(comparison, {"longhorn": 0.01, "exact": 0.02, "llama": 0.01})
    assert [(run.model, run.seed) for run in full] == [(m, s) for s in (1, 2) for m in comparison.bases]
    assert {run.config.eval.interval for run in full} == {2}  # 10 steps, 5 points
    assert len({run.folder for run in [*grid, *full]}) == 12


def test_models_with_one_seed_see_the_same_batches(comparison: Comparison, mesh) -> None:  # type: ignore[no-untyped-def]
    full = full_runs(comparison, dict.fromkeys(comparison.bases, 0.01))
    batches = {(run.model, run.seed): TrainingData(run.config, mesh).micro_batches(7)[0] for run in full}
    first = batches["longhorn", 1]["input_ids"]
    assert first.shape == (4, 16)
    for model in comparison.bases:
        assert torch.equal(batches[model, 1]["input_ids"], first)
        assert torch.equal(batches[model, 2]["targets"], batches["longhorn", 2]["targets"])
    assert not torch.equal(batches["longhorn", 2]["input_ids"], first)


def test_the_rate_with_the_lowest_final_loss_is_chosen_and_the_edge_is_seen(comparison: Comparison) -> None:
    grid = grid_runs(comparison)
    for run, loss in zip(grid[:3], (4.0, 3.5, 3.0), strict=True):
        finish(run, loss)
    diverge(grid[3])
    assert choose_rates(grid[:4]) == {"longhorn": 0.02, "exact": 0.01}
    assert at_edge(0.02, [0.01, 0.02, 0.04]) is False
    assert at_edge(0.04, [0.01, 0.02, 0.04]) is True


def test_a_model_that_diverges_at_every_rate_is_an_error(comparison: Comparison) -> None:
    grid = grid_runs(comparison)[:2]
    for run in grid:
        diverge(run)
    with pytest.raises(ConfigError, match=r"longhorn diverged at each of \[0.01, 0.02\]"):
        choose_rates(grid)


def test_what_is_done_is_left_out_and_only_the_grid_may_diverge(comparison: Comparison) -> None:
    grid, full = grid_runs(comparison), full_runs(comparison, dict.fromkeys(comparison.bases, 0.01))
    finish(grid[0], 4.0)
    finish(full[1], 4.0)
    diverge(grid[2])
    diverge(full[0])
    left = [run.name for run in [*grid, *full] if not training_task(run, comparison, 1.0).complete()]
    expected = [run.name for run in [*grid, *full] if run not in (grid[0], grid[2], full[1])]
    assert left == expected


def test_a_folder_of_another_comparison_is_refused(comparison: Comparison, write: Callable[..., Path]) -> None:
    finish(grid_runs(comparison)[0], 4.0)
    check_leftovers(grid_runs(comparison))
    changed = load_comparison(write(), ["overrides=[optim.clip=0.5]"])
    with pytest.raises(
        ConfigError, match=r"longhorn/0.01 was trained with another config \(optim.clip: 1.0, now 0.5\)"
    ):
        check_leftovers(grid_runs(changed))
    with pytest.raises(ConfigError, match=r"train.precision: \S+, now"):
        precision = "fp32" if changed.base.train.precision != "fp32" else "autocast"
        check_leftovers(grid_runs(load_comparison(write(), [f"overrides=[train.precision={precision}]"])))
    check_leftovers(grid_runs(load_comparison(write(), ["overrides=[train.threads=2]"])))  # no number depends on it


# ---- the pool ------------------------------------------------------------------------------------


def python_task(folder: Path, name: str, code: str) -> Task:
    """A command that is complete where it left a file of its name."""
    return Task(
        name,
        (sys.executable, "-c", code, str(folder / name)),
        folder / "logs" / name,
        seconds=1.0,
        complete=(folder / name).exists,
        progress=lambda: 0.0,
        failure=lambda: "it said no",
    )


TOUCH = "import os, sys; open(sys.argv[1], 'w').write(os.environ['WORKER'])"


def test_a_pool_completes_what_is_left_with_each_workers_environment(tmp_path: Path) -> None:
    (tmp_path / "done").write_text("before")
    tasks = [python_task(tmp_path, name, TOUCH) for name in ("done", "a", "b", "c")]
    seconds: list[float] = []
    Pool([{"WORKER": "0"}, {"WORKER": "1"}], seconds.append).run(tasks, later=0.0)
    assert (tmp_path / "done").read_text() == "before"
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["0", "1"]
    assert (tmp_path / "c").exists()
    assert sum(seconds) > 0


def test_a_failed_command_ends_the_others_and_names_its_log(tmp_path: Path) -> None:
    long = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(print('saved'))); print('on', flush=True)"
    tasks = [
        python_task(tmp_path, "long", f"{long}; time.sleep(600)"),
        python_task(tmp_path, "bad", "import time; time.sleep(1); print('why'); raise SystemExit(3)"),
    ]
    with pytest.raises(TaskFailed) as failed:
        Pool([{}, {}], lambda seconds: None).run(tasks, later=0.0)
    assert "bad ended with exit code 3, it said no" in str(failed.value)
    assert f"the end of {tmp_path}/logs/bad:\nwhy" in str(failed.value)
    assert (tmp_path / "logs" / "long").read_text() in ("", "on\nsaved\n")  # "": it was ended before it began


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told by Linux alone")
def test_a_killed_pool_leaves_nothing_running(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from pretrain.compare.pool import Pool, Task
pid = Path({str(tmp_path / "pid")!r})
sleeper = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid()) + '.'); time.sleep(600)"
task = Task("t", (sys.executable, "-c", sleeper, str(pid)), pid.with_name("log"), 1.0, lambda: False, float, str)
Pool([{{}}], lambda seconds: None).run([task], 0.0)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("."))
    child = int((tmp_path / "pid").read_text()[:-1])
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(child))


def wait_until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- the report ----------------------------------------------------------------------------------


def result(comparison: Comparison, name: str, scale: float, grid: dict[float, float]) -> ModelResult:
    curves = [power_law(scale), power_law(scale * 1.05)]
    perplexity = [Perplexity("all", 3, {16: [100.0, 110.0], 64: [99.0, 112.2]})]
    model = comparison.bases[name].model
    return ModelResult(
        name, model, comparison.parameters[name], 2e6, 1000.0 * scale, 0.01, grid, curves, [1.5, 1.6], perplexity
    )


def test_the_report_has_the_numbers_the_spread_and_the_caveats(comparison: Comparison) -> None:
    models = {
        "longhorn": result(comparison, "longhorn", 1.0, {0.01: power_law(1.0).losses[9], 0.02: math.inf}),
        "exact": result(comparison, "exact", 0.8, {0.01: power_law(0.8).losses[9], 0.02: 9.0}),
        "llama": result(comparison, "llama", 1.5, {0.01: power_law(1.5).losses[9], 0.02: 9.0}),
    }
    pairs = [compare_pair(models["longhorn"], models[name], 10_000) for name in ("exact", "llama")]
    results = Results("longhorn", models, pairs, "digest-of-train", ["abc123"])
    text = markdown(comparison, results, made_of(), ["loss.png", "learning_rate.png", "perplexity.png"])
    assert "**llama** needs 1.50× the tokens of longhorn to equal loss (by seed 1.50×, 1.50×)" in text
    assert "**exact** needs 0.80× the tokens" in text
    difference = power_law(1.5).final - power_law(1.0).final
    assert f"({difference:+.4f}, " in text and "with every seed" in sentence(pairs[1], results)
    assert f"{power_law(1.0).final:.4f}, {power_law(1.05).final:.4f}" in text  # both seeds
    assert "| longhorn | **" in text and "diverged" in text and "edge" in text
    assert "0.9900, 1.0200" in text  # perplexity's ratio, by seed
    assert "1,500 (1.50×)" in text and "digest-of-train" in text and "`abc123`" in text
    assert "draws the ratio towards 1" in text


def test_the_ends_of_the_schedules_give_a_ratio_of_their_own(comparison: Comparison) -> None:
    ours = result(comparison, "longhorn", 1.0, {0.01: 3.0})
    theirs = result(comparison, "exact", 1.0, {0.01: 3.2})
    found = compare_pair(ours, theirs, 10_000).annealed
    assert found.loss == ours.curves[0].final  # both end there
    assert found.ratio == pytest.approx(1.0)


def made_of() -> dict[str, object]:
    return {
        "command": "python -m pretrain.compare x.yaml",
        "device_name": "Some CPU 2 cores",
        "speed": {
            "hardware_name": "Some CPU 2 cores",
            "device": "cpu",
            "threads": 1,
            "micro_batch_size": 4,
            "context": 16,
            "steps": 10,
            "hardware": {"load_average": 0.5},
        },
        "valid_digest": "digest-of-valid",
        "elapsed_seconds": 3000.0,
        "hardware": {"cpu": "Some CPU", "cores": 2},
        "versions": {"python": "3.11", "torch": "2.13", "cuda": None},
        "date": "2026-01-01",
    }


# ---- all of it -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on_and_reports(write: Callable[..., Path], shard, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    command = [sys.executable, "-m", "pretrain.compare", str(write(overrides=["checkpoint.interval=2"]))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    folder = tmp_path / "compare"
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(folder.glob("runs/lr/*/*/DONE"))) >= 2, 600)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/*/DONE")}
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())  # not trained twice
    found = orjson.loads((folder / "report.json").read_bytes())
    assert found["train_digest"] == open_dataset(shard.prefix).digest
    for name in ("longhorn", "exact", "llama"):
        assert len(found["models"][name]["final_validation_losses"]) == 2
        assert [curve["tokens"] for curve in found["models"][name]["curves"]] == [[128, 256, 384, 512, 640]] * 2
    assert (folder / "loss.png").stat().st_size > 10_000
    assert f"report: {folder}/report.md" in again.stdout

    measured = folder / "evaluation" / "longhorn" / "seed_1" / "perplexity.json"
    before = orjson.loads(measured.read_bytes())
    measured.write_bytes(orjson.dumps(before | {"fingerprint": "of weights that were trained anew"}))
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert orjson.loads(measured.read_bytes()) == before
    (folder / "validation.json").write_bytes(orjson.dumps({"digest": "of data that was made anew"}))
    refused = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "measured its losses on other data" in refused.stderr

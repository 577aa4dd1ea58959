"""`pretrain.plan --slurm`: what is read off a script, what is refused, what is foretold."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.shards import Manifest, ShardPaths
from pretrain.config import ConfigError
from pretrain.plan import main
from pretrain.sbatch_script import SbatchScript, Signal

ROOT = Path(__file__).parents[2]
SCRIPT = """#!/bin/bash
# Longhorn
#SBATCH --job-name=tiny --output=%x-%j.out
#SBATCH -N 2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=h100:4   # of eight
#SBATCH --time 1-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue

CONFIG=${CONFIG:-tiny.yaml}
#SBATCH --nodes=99
"""
CONFIG = """
model: {vocab_size: 512, d_model: 64, n_layer: 2}
data: {train: SHARD, valid: SHARD, seqlen: 64}
train: {total_tokens: 102400, global_batch_size: 16, micro_batch_size: 2, precision: fp32}
checkpoint: {interval: 10, keep_last: 2}
"""
CHECKPOINT = 12 * 94_144  # bytes: master and two moments of each parameter


@pytest.fixture
def submit_dir(tmp_path, monkeypatch, shard) -> Path:
    """A directory with a script and its config, whose shard is there; the current one."""
    (tmp_path / "tiny.sh").write_text(SCRIPT)
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("SHARD", shard.prefix))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONFIG", raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def foretold(capsys, *overrides: str) -> dict[str, str]:
    """The printed rows by their first column, of a job that nothing is in the way of."""
    code = main(["tiny.yaml", "--slurm", "tiny.sh", *overrides])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    split = (line.strip().split("  ", 1) for line in captured.out.splitlines())
    return {row[0]: row[1].strip() for row in split if len(row) > 1}


def refusal(capsys, *overrides: str) -> list[str]:
    """The problems that are listed."""
    assert main(["tiny.yaml", "--slurm", "tiny.sh", *overrides]) == 2
    first, *problems = capsys.readouterr().err.splitlines()
    assert first.startswith("plan: refused:")
    return [problem.removeprefix("- ") for problem in problems]


# The script


def test_options_are_read_as_slurm_reads_them(submit_dir):
    script = SbatchScript.read(submit_dir / "tiny.sh")
    assert (script.nodes, script.gpus_per_node, script.time_limit) == (2, 4, 86400)
    assert script.signal == Signal("USR1", True, 600)
    assert script.options["output"] == "%x-%j.out" and script.options["requeue"] == ""
    assert script.config == "tiny.yaml"


@pytest.mark.parametrize("name", ["1p3b", "350m", "125m"])
def test_production_scripts_are_read(name):
    script = SbatchScript.read(ROOT / f"launch/{name}.sh")
    assert script.config == f"launch/configs/{name}.yaml"
    assert script.gpus_per_node == 8 and script.time_limit == 24 * 3600
    assert script.signal == Signal("USR1", True, 600)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("2:00:01", 7201),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:05", 172805),
        ("0", None),
        ("UNLIMITED", None),
    ],
)
def test_times(submit_dir, text, seconds):
    edit(submit_dir / "tiny.sh", "1-00:00:00", text)
    assert SbatchScript.read(submit_dir / "tiny.sh").time_limit == seconds


@pytest.mark.parametrize(
    ("text", "signal"),
    [
        ("USR1", Signal("USR1", False, 60)),
        ("B:SIGUSR1@120", Signal("USR1", True, 120)),
        ("RB:TERM@30", Signal("TERM", True, 30)),
        ("@30", None),
    ],
)
def test_signals(submit_dir, text, signal):
    edit(submit_dir / "tiny.sh", "B:USR1@600", text)
    assert SbatchScript.read(submit_dir / "tiny.sh").signal == signal


def test_other_ways_to_ask_for_gpus_and_nodes(submit_dir):
    script = SbatchScript.read(submit_dir / "tiny.sh")
    assert replace(script, options={"gres": "gpu:a100:2", "nodes": "2-4"}).gpus_per_node == 2
    assert replace(script, options={"gres": "gpu:a100:2", "nodes": "2-4"}).nodes == 2
    with pytest.raises(ConfigError, match="--nodes=many holds no number"):
        assert replace(script, options={"nodes": "many"}).nodes


@pytest.mark.parametrize(
    ("text", "message"),
    [("--time 1-00:00:00", "--time=soon is no time"), ("#SBATCH", "no #SBATCH line before its first command")],
)
def test_script_that_cannot_be_read(submit_dir, capsys, text, message):
    edit(submit_dir / "tiny.sh", text, "--time=soon" if text.startswith("--") else "# SBATCH")
    assert main(["tiny.yaml", "--slurm", "tiny.sh"]) == 2
    assert message in capsys.readouterr().err


def test_missing_script_is_named(submit_dir, capsys):
    assert main(["tiny.yaml", "--slurm", "launch/1p4b.sh"]) == 2
    assert "launch/1p4b.sh: No such file" in capsys.readouterr().err


# What will happen


def test_a_sound_job_is_foretold(submit_dir, capsys, shard):
    rows = foretold(capsys)
    tokens = Manifest.read(ShardPaths.of(shard.prefix).manifest).tokens
    assert rows["GPUs"] == "8 = 2 nodes × 4; 1 tensor × 8 data, ZeRO 1"  # the script's
    assert rows["submit, from the repository's root"] == "sbatch tiny.sh"
    assert rows["asks for"] == "2 nodes × 4 GPUs"
    assert rows["goes on from"] == "the start"
    assert rows["allocations"].startswith("1: 0.0 hours") and rows["allocations"].endswith("no requeue")
    seen_again = ": tokens are seen again" if 102_400 > tokens else ""
    assert rows["data.train"] == f"{tokens:,} tokens, the run takes {102_400 / tokens:.2f} epochs{seen_again}"
    assert rows["checkpoints, at most"].startswith(f"{3 * CHECKPOINT / 1e9:.1f} GB; ")
    assert rows["logs of ranks and nodes"] == "runs/tiny/logs/JOB.ATTEMPT/"
    assert rows["at the time limit"].startswith("600 s before")
    assert "at most 10 steps" in rows["after a crash, on a bad node"]


def test_more_than_an_epoch_is_said(submit_dir, capsys, shard):
    tokens = Manifest.read(ShardPaths.of(shard.prefix).manifest).tokens
    steps = math.ceil(3 * tokens / 1024)
    rows = foretold(capsys, f"train.total_tokens={3 * tokens}")
    assert rows["data.train"].endswith(f"takes {steps * 1024 / tokens:.2f} epochs: tokens are seen again")


def test_what_is_given_goes_before_what_the_script_asks_for(submit_dir, capsys):
    rows = foretold(capsys, "nodes=1", "mfu=0.3", "train.seed=3", "run_dir=elsewhere/x y")
    assert rows["submit, from the repository's root"] == (
        "sbatch --nodes=1 tiny.sh train.seed=3 'run_dir=elsewhere/x y'"
    )
    assert rows["GPUs"].startswith("4 = 1 nodes × 4")
    assert rows["logs of ranks and nodes"] == "elsewhere/x y/logs/JOB.ATTEMPT/"


def test_requeues_are_counted_from_the_newest_checkpoint(submit_dir, capsys):
    """A million steps of a fifth of a second; a 24-hour allocation trains for 23:45."""
    slow = ("train.total_tokens=1024000000", "peak_tflops=4.1e-4", "mfu=1")
    rows = foretold(capsys, *slow)
    hours = float(rows["hours"].replace(",", ""))
    assert 48 < hours < 70
    assert rows["allocations"].startswith("3: ") and rows["allocations"].endswith("2 requeues")
    (submit_dir / "runs/tiny").mkdir(parents=True)
    (submit_dir / "runs/tiny/latest").write_text("step_00900000")
    rows = foretold(capsys, *slow)
    assert rows["goes on from"] == "step 900,000 of 1,000,000"
    assert rows["allocations"].startswith(f"1: {hours / 10:.1f} hours")


def test_config_of_another_script_by_its_variable(submit_dir, capsys, monkeypatch):
    edit(submit_dir / "tiny.sh", "tiny.yaml", "other.yaml")
    [problem] = refusal(capsys)
    assert problem.startswith("tiny.sh: trains other.yaml, not tiny.yaml") and "CONFIG=tiny.yaml" in problem
    monkeypatch.setenv("CONFIG", "tiny.yaml")
    assert foretold(capsys)["submit, from the repository's root"] == "CONFIG=tiny.yaml sbatch tiny.sh"


# What is in the way


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("--requeue", "--no-requeue", "needs --requeue"),
        ("--ntasks-per-node=1", "--ntasks-per-node=4", "needs --ntasks-per-node=1"),
        ("--time 1-00:00:00", "--mem=0", "has no --time"),
        ("--output=%x-%j.out", "--output=logs/%j.out", "no directory logs; Slurm would lose the log: mkdir -p logs"),
        ("--signal=B:USR1@600", "--signal=USR1@600", "needs --signal=B:USR1@600"),
        ("--signal=B:USR1@600", "--mem=0", "needs --signal=B:USR1@600"),
        ("--signal=B:USR1@600", "--signal=B:USR1@30", "--signal comes 30 s before the limit"),
        ("--time 1-00:00:00", "--time=15", "--time of 900 s leaves no time to train"),
        ("CONFIG=${CONFIG:-tiny.yaml}", "CONFIG=tiny.yaml", "has no line CONFIG="),
    ],
)
def test_script_that_would_not_survive(submit_dir, capsys, old, new, problem):
    edit(submit_dir / "tiny.sh", old, new)
    [found] = refusal(capsys)
    assert found.startswith("tiny.sh: ") and problem in found


def test_slow_steps_need_an_earlier_signal(submit_dir, capsys):
    slow = ("peak_tflops=8e-8", "mfu=1")
    [problem] = refusal(capsys, *slow)
    needed = int(problem.rpartition("@")[2])
    assert 1800 < needed < 2400  # twice a step, and a minute
    edit(submit_dir / "tiny.sh", "USR1@600", f"USR1@{needed}")
    foretold(capsys, *slow)


def test_missing_shard_is_refused_with_the_command_that_makes_it(submit_dir, capsys):
    train, valid = refusal(capsys, "data.train=data/none", "data.valid=data/neither")
    assert train.startswith("data.train=data/none: no such shard; make it: python -m data_tools.tokenize")
    assert "--output data/none" in train and "--output data/neither" in valid
    foretold(capsys, "data.valid=data/neither", "eval.interval=0")  # not read then


def test_unfit_shards(submit_dir, capsys, shard):
    problems = refusal(capsys, "model.vocab_size=300")
    assert len(problems) == 2 and all("set model.vocab_size=512" in problem for problem in problems)
    for source in vars(ShardPaths.of(shard.prefix)).values():
        shutil.copy(source, submit_dir)
    prefix = submit_dir / Path(shard.prefix).name
    Path(f"{prefix}.bin").write_bytes(b"cut")
    [problem] = refusal(capsys, f"data.valid={prefix}")
    assert f"{prefix}.bin has 3 bytes" in problem


def test_disk_must_hold_all_that_is_kept(submit_dir, capsys):
    """keep_last + the next + the best + every tenth of the 100 steps."""
    every = ("checkpoint.keep_every=10", "checkpoint.keep_best=true", "eval.interval=1")
    assert foretold(capsys, *every)["checkpoints, at most"].startswith(f"{14 * CHECKPOINT / 1e9:.1f} GB")
    [problem] = refusal(capsys, "checkpoint.keep_last=1000000000")
    assert "the disk of runs/tiny has" in problem and f"{1_000_000_001 * CHECKPOINT / 1e9:,.1f} GB" in problem


@pytest.mark.parametrize("name", ["DONE", "STOP"])
def test_run_that_would_end_at_once(submit_dir, capsys, name):
    (submit_dir / "runs/tiny").mkdir(parents=True)
    (submit_dir / "runs/tiny" / name).touch()
    [problem] = refusal(capsys)
    assert "would end at once" in problem


def test_all_problems_are_listed_together(submit_dir, capsys):
    edit(submit_dir / "tiny.sh", "#SBATCH --requeue", "")
    problems = refusal(capsys, "data.train=data/none", "nodes=3", "gpu_memory_gib=1", "checkpoint.keep_last=1000000000")
    assert [p.partition(":")[0].partition("=")[0] for p in problems[:2]] == ["tiny.sh", "data.train"]
    assert "the checkpoints take up to" in problems[2]
    assert problems[3].startswith("train.global_batch_size=16 is no multiple")

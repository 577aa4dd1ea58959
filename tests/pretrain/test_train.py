"""The training command as a user meets it: files, refusals, signals, resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kernels import selftest
from pretrain import lock
from pretrain.train import main

CONFIG = """
model: {vocab_size: 512, d_model: 32, n_layer: 1}
data: {seqlen: 32}
train: {total_tokens: 38400, global_batch_size: 4, micro_batch_size: 2, precision: fp32, threads: 1}
checkpoint: {interval: 100}
eval: {interval: 150, tokens: 2000}
log: {wandb: disabled, interval: 50}
"""


@pytest.fixture
def command(shard, tmp_path: Path) -> list[str]:  # type: ignore[no-untyped-def]
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    arguments = [str(config), f"data.train={shard.prefix}", f"data.valid={shard.prefix}"]
    return [sys.executable, "-m", "pretrain.train", *arguments]


def steps(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [values for line in lines if "loss" in (values := json.loads(line))]


def test_a_stop_file_stops_until_it_is_removed(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, job_file = tmp_path / "run", tmp_path / "stop"
    arguments = [*command[3:], f"run_dir={run}"]
    job_file.touch()  # asked to before it began: nothing is trained
    assert main([*arguments, "--stop-file", str(job_file)]) == 0
    assert json.loads((run / "status.json").read_text())["reason"] == "signal"
    assert steps(run) == []
    (run / "STOP").touch()
    assert main(arguments) == 0
    assert f"{run} waits; to go on, remove {run / 'STOP'}" in capsys.readouterr().out


def test_a_signal_saves_and_the_next_start_goes_on_as_if_nothing_happened(command: list[str], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = subprocess.run([*command, f"run_dir={whole}"], capture_output=True, text=True, check=True)
    assert "300 steps of 128 tokens" in done.stdout and "MFU n/a" in done.stdout and "ETA" in done.stdout
    assert {"DONE", "config.yaml", "latest", "metrics.jsonl", "status.json"} <= {p.name for p in whole.iterdir()}
    assert json.loads((whole / "status.json").read_text())["reason"] == "done"

    process = subprocess.Popen([*command, f"run_dir={cut}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not ((cut / "metrics.jsonl").exists() and len(steps(cut)) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        os.sched_yield()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    status = json.loads((cut / "status.json").read_text())
    assert status["reason"] == "signal" and 3 <= status["step"] < 300
    assert (cut / "latest").read_text() == f"step_{status['step']:08d}" and not (cut / "DONE").exists()

    with (cut / "metrics.jsonl").open("a") as file:  # what a crash after the checkpoint leaves
        file.write('{"step": 299, "consumed_tokens": 1, "loss": 9, "grad_norm": 9, "lr": 9}\n{"step": 3')
    subprocess.run([*command, f"run_dir={cut}"], check=True, stdout=subprocess.DEVNULL)
    assert (cut / "DONE").exists()
    kept = ("step", "consumed_tokens", "loss", "grad_norm", "lr")
    assert [[s[k] for k in kept] for s in steps(cut)] == [[s[k] for k in kept] for s in steps(whole)]
    assert steps(whole)[-1]["loss"] < steps(whole)[0]["loss"] - 0.5


def test_validation_is_recorded(command: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    subprocess.run([*command, f"run_dir={run}", "train.total_tokens=1280", "eval.interval=5"], check=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0] < 6.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.sed=1", "did you mean 'train.seed'"),
        ("train.global_batch_size=5", "nearest that are: 4 or 6"),
        ("parallel.tensor=2", "does not divide 1 processes"),
        ("model.vocab_size=100", "set model.vocab_size=512"),
        ("data.valid=/nowhere/shard", "/nowhere/shard.manifest.json"),
        ("eval.tokens=10", "no window of data.seqlen=32 fits"),
    ],
)
def test_what_cannot_run_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, override: str, message: str
) -> None:
    assert main([*command[3:], f"run_dir={tmp_path / 'run'}", override]) == 2
    assert message in capsys.readouterr().err


HOLDER = """
import fcntl, sys
with open(sys.argv[1], "a+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    file.write("Slurm job 77, process 5 on node1")
    file.flush()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_jobs_do_not_train_in_one_folder(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(run / "lock")], text=True, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert main([*command[3:], f"run_dir={run}"]) == 1
        message = f"another job trains in {run}: Slurm job 77, process 5 on node1 holds {run / 'lock'}"
        assert message in capsys.readouterr().err
        assert [p.name for p in run.iterdir()] == ["lock"]
        other.stdin.close()


def test_a_wrong_kernel_stops_the_run_before_it_starts(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise selftest.SelfTestError("longhorn_scan is off by 0.1")

    monkeypatch.setattr(selftest, "require", fail)
    run = tmp_path / "run"
    assert main([*command[3:], f"run_dir={run}"]) == 1
    assert capsys.readouterr().err.count("error (rank 0): longhorn_scan is off by 0.1") == 1
    assert json.loads((run / "status.json").read_text())["reason"] == "error"
    assert {p.name for p in run.iterdir()} == {"config.yaml", "lock", "status.json"}


# Both processes as if each had a GPU of its own to test, and the second one's broken.
ONE_BROKEN = """
import os, sys
from kernels import selftest
from pretrain import lock
from pretrain import train

def require(device, say):
    if os.environ["RANK"] == "1":
        raise selftest.SelfTestError("longhorn_scan is off by 0.1")

selftest.require = require
os.environ["LOCAL_RANK"] = "0"
code = train.main(sys.argv[1:])
print(f"rank {os.environ['RANK']} ends with {code}", flush=True)
sys.exit(code)
"""


def test_one_broken_gpu_stops_every_rank(command: list[str], tmp_path: Path) -> None:
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(ONE_BROKEN)
    root = Path(__file__).parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*torchrun, *command[3:], f"run_dir={run}"],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert all(f"rank {rank} ends with 1" in done.stdout for rank in (0, 1)), done.stdout
    assert done.stderr.count("error (rank 1): longhorn_scan is off by 0.1") == 2  # said by itself, and by rank 0
    assert json.loads((run / "status.json").read_text())["reason"] == "error"
    assert not (run / "metrics.jsonl").exists()

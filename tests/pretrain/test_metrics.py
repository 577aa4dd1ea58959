"""What a run says while it trains survives a full disk and a wandb that fails."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain import metrics
from pretrain.config import Config
from pretrain.data import ShardDocuments
from pretrain.metrics import MetricsLog
from pretrain.status import read_status, write_failure, write_status

VALUES = {
    "data_seconds": 0.0,
    **{"loss": 2.0, "grad_norm": 1.0, "lr": 1e-3},
    **{"forward_seconds_median": 1.0, "forward_seconds_max": 1.1, "slowest_rank": 3, "data_seconds": 0.01},
}


def steps(config: Config) -> list[int]:
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.fixture
def log(config: Config) -> MetricsLog:
    Path(config.run_dir).mkdir()
    return MetricsLog(config, 1, 0)


class FullDisk:
    """Takes a few bytes of each write, as a disk does before it is full, then none."""

    def __init__(self, file) -> None:  # type: ignore[no-untyped-def]
        self.file, self.full = file, True

    def write(self, line: bytes) -> int:
        return self.file.write(line[:7] if self.full else line)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def test_lines_that_a_full_disk_refuses_are_written_later(
    config: Config, log: MetricsLog, capsys: pytest.CaptureFixture
) -> None:
    log.train_step(1, 64, VALUES)
    log.file.file = disk = FullDisk(log.file.file)
    for step in (2, 3):
        log.train_step(step, 64 * step, VALUES)
    assert steps(config) == [1]
    assert capsys.readouterr().err.count("metrics.jsonl: No space left on device; lines are kept in memory") == 1
    disk.full = False
    log.train_step(4, 256, VALUES)
    assert steps(config) == [1, 2, 3, 4]


def test_a_failing_wandb_is_left_alone(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calls = []

    def lost(*_: object, **__: object) -> None:
        calls.append(1)
        raise ConnectionError("no route to host")

    config.log.wandb = "online"
    Path(config.run_dir).mkdir()
    run = SimpleNamespace(log=lost, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run, Settings=lambda **_: None))
    log = MetricsLog(config, 1, 0)
    for step in (1, 2):
        log.train_step(step, 64 * step, VALUES)
    assert steps(config) == [1, 2] and calls == [1]
    assert "wandb failed, training goes on without it: no route to host" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lost, Settings=lambda **_: None))
    MetricsLog(config, 1, 2).train_step(3, 192, VALUES)
    assert steps(config) == [1, 2, 3]


def test_a_log_that_takes_no_line_does_not_end_the_run(
    config: Config, log: MetricsLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        patch.setattr(sys, "stderr", Full())
        log.train_step(10, 640, VALUES)
        log.skipped(11, "loss is nan", [ShardDocuments("all", "shard", [1])])
    assert steps(config) == [10]


def test_a_slow_rank_is_named(config: Config, log: MetricsLog, capsys: pytest.CaptureFixture) -> None:
    log.train_step(10, 640, VALUES)
    assert "slower" not in capsys.readouterr().out
    log.train_step(10, 640, VALUES | {"forward_seconds_max": 1.5})
    assert "rank 3 1.50× slower" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_null(config: Config, log: MetricsLog) -> None:
    log.train_step(1, 64, VALUES | {"grad_norm": math.nan})
    [line] = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    assert '"grad_norm":null' in line


def test_documents_beyond_a_screenful_are_counted() -> None:
    assert metrics._shortened(["a 1", "a 2", "b 3"]) == "a 1, a 2, b 3"
    assert metrics._shortened([str(i) for i in range(50)]).endswith("18, 19, … 30 more in skipped.jsonl")


def test_the_first_failure_is_the_one_that_is_told(tmp_path: Path) -> None:
    write_status(tmp_path, "running")
    write_failure(tmp_path, "error", 5, 320, "rank 3: out of memory")
    write_failure(tmp_path, "error", 5, 320, "rank 0: connection closed by peer")
    status = read_status(tmp_path)
    assert (status["reason"], status["step"], status["detail"]) == ("error", 5, "rank 3: out of memory")
    assert (tmp_path / "status.json").read_text().count("\n") == 1


def test_a_full_disk_still_takes_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_status(tmp_path, "running", detail="a longer line than the next one, to see that nothing of it stays")
    monkeypatch.setattr("pretrain.status.write_durably", full)
    write_status(tmp_path, "checkpoint", 3)
    assert read_status(tmp_path)["reason"] == "checkpoint"

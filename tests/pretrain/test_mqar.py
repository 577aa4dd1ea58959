"""MQAR: the data is what it is defined to be, models learn it, a stopped grid goes on, mistakes are named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from pretrain.config import ConfigError
from pretrain.mqar import __main__ as command
from pretrain.mqar.config import Cell, TrainingConfig, cells, load_grid
from pretrain.mqar.report import summarize, table
from pretrain.mqar.task import NOT_SCORED, TEST, TRAIN, TaskConfig, make_examples
from pretrain.mqar.train import CellResult, train_cell

TASK = TaskConfig(seqlen=64, pairs=8, batch_size=32)
GRID = """
models:
  longhorn: {name: longhorn, d_state: 4}
  attention: {name: attention, head_dim: 8}
tasks: [{seqlen: 8, pairs: 2, batch_size: 8}]
widths: [8]
learning_rates: [1.0e-3]
training: {vocab_size: 16, train_examples: 16, test_examples: 8, epochs: 1}
"""


def answer(sequence: list[int], pairs: int) -> dict[int, int]:
    """The oracle: position → value of the key there, for each key after the pairs."""
    known = dict(zip(sequence[0 : 2 * pairs : 2], sequence[1 : 2 * pairs : 2], strict=True))
    return {place: known[token] for place, token in enumerate(sequence) if place >= 2 * pairs and token in known}


def test_each_key_is_asked_for_once_and_its_value_is_the_target() -> None:
    examples = make_examples(TASK, vocab_size=64, count=200, power=0.01, seed=0, part=TRAIN)
    for inputs, targets in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
        asked = {place: target for place, target in enumerate(targets) if target != NOT_SCORED}
        assert asked == answer(inputs, TASK.pairs)
        assert len(asked) == TASK.pairs
        keys, values = inputs[0:16:2], inputs[1:16:2]
        assert len(set(keys)) == len(set(values)) == TASK.pairs
        assert 1 <= min(keys) <= max(keys) < 32 <= min(values) <= max(values) < 64
        assert sum(token == 0 for token in inputs) == 64 - 3 * 8
        assert all(place % 2 == 0 for place in asked)


def test_keys_and_values_are_drawn_alike() -> None:
    examples = make_examples(TaskConfig(16, 4), vocab_size=16, count=7000, power=0.01, seed=0, part=TRAIN)
    keys, values = examples.inputs[:, 0:8:2], examples.inputs[:, 1:8:2]
    for column in range(4):  # of 7 keys and 8 values: within 5 standard deviations of 1000 and 875
        assert (torch.bincount(keys[:, column], minlength=8)[1:] - 1000).abs().max() < 147
        assert (torch.bincount(values[:, column], minlength=16)[8:] - 875).abs().max() < 139


def test_queries_follow_the_power_law() -> None:
    """With one pair, a gap is one draw: P(gap) ∝ (gap + 1)^(power − 1)."""
    examples = make_examples(TaskConfig(32, 1), vocab_size=16, count=20_000, power=0.01, seed=0, part=TRAIN)
    gaps = ((examples.targets != NOT_SCORED).int().argmax(dim=1) - 2) // 2
    expected = np.arange(1, 16) ** -0.99
    expected /= expected.sum()
    found = torch.bincount(gaps, minlength=15).numpy() / 20_000
    assert np.abs(found - expected).max() < 0.015  # 4 standard deviations of the likeliest
    assert found[0] > 0.28


def test_data_is_the_same_for_a_seed_and_disjoint_otherwise() -> None:
    def rows(count: int, seed: int, part: int) -> set[bytes]:
        made = make_examples(TASK, 64, count, 0.01, seed, part)
        return {row.numpy().tobytes() for row in made.inputs}

    train = rows(2000, seed=0, part=TRAIN)
    assert train == rows(2000, seed=0, part=TRAIN)
    assert len(train) == 2000
    assert not train & rows(500, seed=0, part=TEST)
    assert not train & rows(500, seed=1, part=TRAIN)


@pytest.mark.parametrize(
    ("task", "vocab", "message"),
    [
        (TaskConfig(15, 4), 64, "4 pairs in 15 tokens"),
        (TaskConfig(16, 0), 64, "at least 1"),
        (TaskConfig(64, 8), 16, "it must be at least 18"),
    ],
)
def test_a_task_without_room_is_refused(task: TaskConfig, vocab: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_examples(task, vocab, 1, 0.01, 0, TRAIN)


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(f"output: {tmp_path / 'out'}\n{GRID}")
    return path


def test_a_stopped_grid_goes_on(grid: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(grid), "widths=[8]", "--device", "cpu"]) == 0
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/cells").iterdir()}
    assert len(first) == 2
    next(iter(first)).unlink()  # as if it had been stopped before this one
    assert command.main([str(grid), "widths=[8,16]", "--device", "cpu", "--workers", "2"]) == 0
    second = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/cells").iterdir()}
    assert len(second) == 4
    assert sum(second[path] == time for path, time in first.items()) == 1
    assert "4 cells, 1 of them trained earlier" in capfd.readouterr().out
    report = orjson.loads((tmp_path / "out/results.json").read_bytes())
    assert [(row["label"], row["width"]) for row in report["rows"]] == [
        *(("longhorn", 8), ("attention", 8), ("longhorn", 16), ("attention", 16))
    ]
    assert (tmp_path / "out/table.md").read_text().count("\n| 8 | 2 | ") == 4
    assert (tmp_path / "out/accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_result_is_named(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = cells(load_grid(grid))[0]
    path = tmp_path / f"out/cells/{cell.key}.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert command.main([str(grid), "--device", "cpu"]) == 1
    assert f"{path}: not a cell's result" in capsys.readouterr().err


def test_a_cell_is_the_same_again_and_another_with_other_settings(grid: Path) -> None:
    cell = cells(load_grid(grid))[0]
    first, again = (train_cell(cell, torch.device("cpu")) for _ in range(2))
    assert replace(first, seconds=0) == replace(again, seconds=0)
    others = [
        *(replace(cell, seed=1), replace(cell, width=16), replace(cell, task=TaskConfig(8, 1, 8))),
        replace(cell, training=replace(cell.training, epochs=2)),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 5


def test_longhorn_learns_to_recall() -> None:
    """Two pairs: a model that only knows which values a sequence has answers half of the queries."""
    training = TrainingConfig(vocab_size=32, train_examples=12_800, test_examples=500, epochs=4, stop_accuracy=0.9)
    task = TaskConfig(seqlen=8, pairs=2, batch_size=128)
    result = train_cell(Cell("longhorn", {"name": "longhorn"}, task, 64, 3e-3, 0, training), torch.device("cpu"))
    assert result.accuracy >= 0.9
    assert result.epochs < 4  # it stopped early
    assert not result.diverged


def test_state_is_counted(grid: Path) -> None:
    """Longhorn's two layers keep 16 channels of 4 + 3 numbers; attention's 8 keys and values of 8 at 8 tokens."""
    found = [train_cell(cell, torch.device("cpu")).state_numbers for cell in cells(load_grid(grid))]
    assert found == [2 * 16 * (4 + 3), 2 * 8 * 2 * 8]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainin.epochs=1", "unknown key 'trainin'"),
        ("training.epoch=1", "did you mean 'training.epochs'?"),
        ("training.epochs=0", "training.epochs must be at least 1, got 0"),
        ("widths=[]", "widths is empty"),
        ("widths=[x]", "widths"),
        ("learning_rates=[-1.0]", "learning_rates must be above 0, got -1"),
        ("models.mamba={name: mambo}", "models.mamba.name: 'mambo' is not one of"),
        ("models.longhorn.d_stat=4", "models.longhorn: unknown key 'd_stat'; did you mean 'd_state'?"),
        ("models.attention.head_dim=3", "models.attention at width 8"),
        ("tasks=[{seqlen: 8, pairs: 3, batch_size: 8}]", "tasks[0]: 3 pairs in 8 tokens"),
        ("tasks=[{seqlen: 8, pairs: 2, batch_size: 17}]", "tasks[0].batch_size must be from 1 to"),
        ("training.warmup_fraction=1", "training.warmup_fraction must be in [0, 1)"),
    ],
)
def test_mistakes_are_named(grid: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_grid(grid, [override])
    assert message in str(error.value)


def test_the_grids_that_ship_are_whole() -> None:
    paper = cells(load_grid("launch/configs/mqar_paper.yaml"))
    assert len(paper) == 5 * 4 * 4 * 4
    assert {(c.task.seqlen, c.task.pairs) for c in paper} == {(64, 4), (128, 8), (256, 16), (512, 64)}
    assert {cell.label for cell in cells(load_grid("launch/configs/mqar_cpu.yaml"))} == {c.label for c in paper}


def test_the_best_rate_is_that_of_all_seeds() -> None:
    def result(rate: float, seed: int, accuracy: float) -> tuple[Cell, CellResult]:
        cell = Cell("longhorn", {"name": "longhorn"}, TASK, 32, rate, seed, TrainingConfig())
        return cell, CellResult(cell.key, {}, accuracy, 3 + seed, False, 1.0, 100, 10, 1.0)

    results = [result(0.1, 0, 0.9), result(0.1, 1, 0.1), result(0.2, 0, 0.6), result(0.2, 1, 0.7), result(0.3, 0, 1.0)]
    (row,) = summarize(results)
    assert (row.learning_rate, row.accuracies, row.epochs) == (0.2, [0.6, 0.7], 3.5)
    assert row.accuracy == pytest.approx(0.65)
    assert row.spread == pytest.approx(0.1)
    text = table([row], done=5, cells=6)
    assert text.startswith("5 of 6 cells. Accuracy at the best learning rate, mean of 2 seeds")
    assert "| 64 | 8 | 32 | longhorn | 0.650 ± 0.050 | 0.2 | 3.5 | 100 | 10 |" in text

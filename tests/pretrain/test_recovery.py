"""Steps that go wrong: skipped, rolled back over, reported; and what the run's files say of it."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from data_tools.shards import open_shard
from pretrain import trainer as training
from pretrain.config import Config, RecoveryConfig
from pretrain.guard import Rollback, StepGuard, read_rollbacks, write_rollbacks
from pretrain.parallel.mesh import Mesh
from pretrain.status import read_status
from pretrain.stop import Stop
from pretrain.trainer import Trainer, TrainingError


def lines(config: Config, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(config.run_dir) / name).read_text().splitlines()]


def losses(config: Config) -> dict[int, float | None]:
    return {line["step"]: line["loss"] for line in lines(config) if "loss" in line}


def poison(trainer: Trainer, steps: set[int]) -> None:
    """Make the gradient of these steps NaN, whenever they are trained."""
    weight = trainer.engine.module.blocks[0].mixer.out_proj.weight
    weight.register_hook(lambda g: g * torch.nan if trainer.progress.step + 1 in steps else g)


def masters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {f"{f.name}|{kind}": t.clone() for f in trainer.engine.fragments() for kind, t in f.tensors.items()}


def test_a_bad_batch_is_skipped_and_named(config: Config, mesh: Mesh, capsys: pytest.CaptureFixture) -> None:
    trainer = Trainer(config, mesh)
    poison(trainer, {4})
    assert trainer.run() == "done"
    assert (trainer.progress.step, trainer.progress.optimizer_steps) == (10, 9)
    assert trainer.progress.consumed_tokens == 640
    [skipped] = [line for line in lines(config) if line.get("skipped")]
    assert skipped["step"] == 4 and skipped["grad_norm"] is None and skipped["loss"] > 5
    [named] = lines(config, "skipped.jsonl")
    assert (named["step"], named["reason"]) == (4, "the gradient is not finite")
    assert named["documents"] == [asdict(found) for found in trainer.data.documents(3)] != []
    assert "step 4  skipped: the gradient is not finite; documents" in capsys.readouterr().err
    assert not (Path(config.run_dir) / "rollbacks.json").exists()


def test_a_batchs_documents_are_those_its_tokens_come_from(config: Config, mesh: Mesh) -> None:
    data = Trainer(config, mesh).data
    shard = open_shard(config.data.train)
    [found] = data.documents(2)
    assert (found.source, found.shard) == ("all", Path(config.data.train).name)
    documents = [set(shard[d].tolist()) for d in found.documents]
    [batch] = data.micro_batches(2)
    assert set(batch["input_ids"].unique().tolist()) <= set.union(*documents)
    assert len(documents) < len(shard)


def test_a_weight_gone_bad_is_mended_by_a_roll_back(config: Config, mesh: Mesh, capsys: pytest.CaptureFixture) -> None:
    """From step 6 on every loss is NaN, until the checkpoint of step 4 is back; 6 to 8 are then passed over."""
    config.checkpoint.interval, config.recovery.max_skips = 4, 3
    trainer = Trainer(config, mesh)
    train_step, broken = trainer.train_step, []

    def step() -> dict | None:
        if trainer.progress.step == 5 and not broken:
            broken.append(True)
            trainer.engine.module.norm.weight.data[0] = torch.nan
        return train_step()

    trainer.train_step = step
    assert trainer.run() == "done"
    assert [(r.to_step, r.first, r.last) for r in read_rollbacks(Path(config.run_dir))] == [(4, 6, 8)]
    assert "back to" in capsys.readouterr().out
    assert [line["step"] for line in lines(config, "skipped.jsonl")] == [6, 7, 8]
    assert trainer.progress.optimizer_steps == 7

    # The same numbers as a run that was told beforehand to pass over them.
    told = Path(config.run_dir).with_name("told")
    told.mkdir()
    write_rollbacks(told, [Rollback(4, 6, 8, "")])
    config.run_dir, before, got = str(told), losses(config), masters(trainer)
    other = Trainer(config, mesh)
    other.run()
    assert losses(config) == before and list(before) == list(range(1, 11))
    assert all(torch.equal(t, got[name]) for name, t in masters(other).items())


def test_it_stops_when_roll_backs_do_not_help(config: Config, mesh: Mesh) -> None:
    config.checkpoint.interval, config.recovery.max_skips, config.recovery.max_rollbacks = 2, 2, 2
    trainer = Trainer(config, mesh)
    poison(trainer, set(range(4, 11)))
    report = r"steps 8 to 9 updated nothing \(the gradient is not finite\), after 2 roll-backs"
    with pytest.raises(TrainingError, match=report):
        trainer.run()
    assert [(r.first, r.last) for r in trainer.guard.rollbacks] == [(4, 5), (6, 7)]
    # A restart does not begin to count anew.
    again = Trainer(config, mesh)
    poison(again, set(range(4, 11)))
    with pytest.raises(TrainingError, match="after 2 roll-backs"):
        again.run()


def test_the_last_step_does_not_end_a_run_on_a_bad_model(config: Config, mesh: Mesh) -> None:
    trainer = Trainer(config, mesh)
    train_step = trainer.train_step

    def step() -> dict | None:
        if trainer.progress.step == 8 and not trainer.guard.rollbacks:
            trainer.engine.module.norm.weight.data[0] = torch.nan
        return train_step()

    trainer.train_step = step
    assert trainer.run() == "done"
    assert [(r.to_step, r.first, r.last) for r in trainer.guard.rollbacks] == [(0, 9, 10)]
    assert all(t.isfinite().all() for t in masters(trainer).values())


@pytest.mark.parametrize("bad", [5, 10])
def test_a_stop_in_a_skipped_step_saves_what_was_trained(config: Config, mesh: Mesh, bad: int) -> None:
    """The skip updated nothing, so that the model is as good as it was: 4 (or 9) updates must not be lost."""
    trainer = Trainer(config, mesh)
    poison(trainer, {bad})
    wanted = trainer.stop.wanted
    trainer.stop.wanted = lambda: Stop.SIGNAL if trainer.progress.step == bad else wanted()
    assert trainer.run() == ("done" if bad == 10 else "signal")
    assert read_status(Path(config.run_dir))["step"] == bad
    resumed = Trainer(config, mesh)
    assert (resumed.progress.step, resumed.progress.optimizer_steps) == (bad, bad - 1)


def test_a_second_roll_back_goes_further_back(config: Config, mesh: Mesh) -> None:
    """The newest checkpoint may hold what is wrong."""
    config.checkpoint.interval, config.checkpoint.keep_last, config.recovery.max_skips = 2, 5, 2
    trainer = Trainer(config, mesh)
    poison(trainer, {5, 6, 7, 8})  # after 5 and 6 are passed over, 6 is saved, and so is the trouble
    trainer.guard.rollbacks.append(Rollback(6, 90, 91, ""))
    trainer.run()
    assert [r.to_step for r in trainer.guard.rollbacks[1:]] == [4, 2]


def test_a_spike_is_skipped_where_that_is_wanted(config: Config, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    config.recovery.spike_sigmas, config.recovery.spike_window, config.checkpoint.interval = 50.0, 3, 4
    build = training.build_model

    def build_spiking(*arguments: object) -> torch.nn.Module:
        """Six times the loss in step 6."""
        model = build(*arguments)
        model.register_forward_hook(lambda *a: a[-1] * 6 if trainer.progress.step == 5 else a[-1])
        return model

    monkeypatch.setattr(training, "build_model", build_spiking)
    trainer = Trainer(config, mesh)
    trainer.run()
    [skipped] = [line for line in lines(config) if line.get("skipped")]
    assert skipped["step"] == 6 and "is more than 50 standard deviations" in skipped["skipped"]
    assert skipped["loss"] > 30
    # The window of the last three trained losses is part of the checkpoint.
    kept = tuple(loss for step, loss in losses(config).items() if step != 6)[-3:]
    assert Trainer(config, mesh).guard.recent_losses == kept


def test_spikes_are_judged_by_the_window() -> None:
    guard = StepGuard(RecoveryConfig(spike_sigmas=3.0, spike_window=4), [], [])
    for step, loss in enumerate([2.0, 2.2, 2.0], 1):
        assert guard.judge_loss(100.0) is None  # too few to judge by
        guard.record(step, loss, None)
    guard.record(4, 2.2, None)
    assert guard.judge_loss(2.39) is None
    assert "3 standard deviations of 0.1000 above 2.1000" in guard.judge_loss(2.41)
    guard.record(5, 100.0, "spike")
    assert guard.recent_losses == (2.0, 2.2, 2.0, 2.2)
    assert guard.judge_loss(math.nan) == "loss is nan" and guard.judge_loss(math.inf) == "loss is inf"
    assert StepGuard(RecoveryConfig(), [], []).judge_loss(1e9) is None

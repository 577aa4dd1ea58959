"""Checkpoints on disk: whole or absent, verified, passed over when damaged, refused when another run's."""

import concurrent.futures
import json
import math
import random
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoint import CheckpointError, load_model, newest, read_manifest
from pretrain.checkpoint import save as saving
from pretrain.config import Config, ConfigError
from pretrain.parallel.mesh import Mesh
from pretrain.trainer import Trainer


def trained(config: Config, mesh: Mesh, steps: int = 2) -> Trainer:
    """A run with a checkpoint after every step."""
    trainer = Trainer(config, mesh)
    for _ in range(steps):
        trainer.train_step()
        save(trainer)
    return trainer


def save(trainer: Trainer) -> None:
    trainer.save()
    trainer.writer.wait()


def test_layout_and_retention(config: Config, mesh: Mesh) -> None:
    trained(config, mesh, 3)
    run = Path(config.run_dir)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    assert (run / "latest").read_text() == "step_00000003"
    manifest = read_manifest(run / "checkpoints" / "step_00000003")
    assert (manifest.progress.step, manifest.progress.consumed_tokens, manifest.progress.optimizer_steps) == (
        3,
        192,
        3,
    )
    assert manifest.config["train"]["global_batch_size"] == 4 and manifest.tokenizer["vocab_size"] == 512
    covered = sum(count for file in manifest.files for _, count in file.fragments.values())
    assert covered == sum(torch.Size(s.shape).numel() for s in manifest.parameters.values())


def saved(config: Config) -> list[int]:
    folders = (Path(config.run_dir) / "checkpoints").glob("step_" + "[0-9]" * 8)
    return sorted(int(f.name.removeprefix("step_")) for f in folders)


def test_retention_is_the_union_of_its_rules(config: Config, mesh: Mesh) -> None:
    config.checkpoint.keep_last, config.checkpoint.keep_every, config.checkpoint.keep_best = 2, 3, True
    trainer = Trainer(config, mesh)
    for loss in (5.0, 3.0, None, 4.0, 3.5, 3.2, None, 3.1):  # the best after step 2
        trainer.train_step()
        trainer.save(loss)
    trainer.writer.wait()
    assert saved(config) == [2, 3, 6, 7, 8]
    assert read_manifest(Path(config.run_dir) / "checkpoints" / "step_00000002").validation_loss == 3.0
    assert not list((Path(config.run_dir) / "checkpoints").glob(".*"))


def test_training_goes_on_while_a_save_is_written(config: Config, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is held until later steps have changed the model: the checkpoint still is of its own step."""
    may_write, write = threading.Event(), saving.save_file

    def held(*arguments: object) -> None:
        assert may_write.wait(60)
        write(*arguments)

    monkeypatch.setattr(saving, "save_file", held)
    trainer = trained(config, mesh, 0)
    trainer.train_step()
    want = masters(trainer)
    trainer.save()
    for _ in range(3):
        trainer.train_step()
    assert not trainer.writer.failed() and trainer.writer.finished() is None and saved(config) == []
    may_write.set()
    report = trainer.writer.wait()
    assert saved(config) == [1] and report.step == 1
    assert report.size == sum(f.stat().st_size for f in report.path.glob("rank_*"))
    resumed = Trainer(config, mesh)
    assert_equal(masters(resumed), want)


def test_a_checkpoint_that_cannot_be_removed_yet_ends_nothing(
    config: Config, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def still_read(path: Path, *_: object, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", still_read)
        trained(config, mesh, 3)
    assert "old checkpoint not removed: [Errno 39]" in capsys.readouterr().err
    folder = Path(config.run_dir) / "checkpoints"
    assert saved(config) == [2, 3] and [p.name for p in folder.glob(".*")] == [".removed_step_00000001"]
    trainer = Trainer(config, mesh)
    trainer.train_step()
    save(trainer)
    assert not list(folder.glob(".*"))


def test_a_persons_copy_is_no_checkpoint_of_the_run(config: Config, mesh: Mesh) -> None:
    trained(config, mesh, 2)
    folder = Path(config.run_dir) / "checkpoints"
    copy = folder / "step_00000002_mine"
    shutil.copytree(folder / "step_00000002", copy)
    config.checkpoint.keep_last, config.checkpoint.keep_every = 1, 5
    trainer = Trainer(config, mesh)
    trainer.train_step()
    save(trainer)
    assert saved(config) == [3] and (copy / "manifest.json").exists()


def test_a_model_that_is_not_finite_is_not_saved(config: Config, mesh: Mesh) -> None:
    trainer = trained(config, mesh, 1)
    next(trainer.engine.fragments()).tensors["exp_avg"][0] = torch.nan
    trainer.train_step()
    with pytest.raises(CheckpointError, match="rank 0: .* is not finite: a run could not go on from it"):
        save(trainer)
    assert saved(config) == [1] and Trainer(config, mesh).progress.step == 1


def test_checkpoints_that_are_gone_are_missed(config: Config, mesh: Mesh, capsys: pytest.CaptureFixture) -> None:
    trained(config, mesh, 2)
    folder = Path(config.run_dir) / "checkpoints"
    shutil.rmtree(folder / "step_00000002")
    assert Trainer(config, mesh).progress.step == 1
    assert "latest names step_00000002, which is gone" in capsys.readouterr().err
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="latest names step_00000001, but no checkpoint is there"):
        Trainer(config, mesh)


def test_a_save_that_failed_ends_the_run_at_the_next_step(
    config: Config, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(config, mesh, 1)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full_disk)
    trainer.train_step()
    trainer.save()
    concurrent.futures.wait([trainer.writer._in_flight])
    trainer.saved_step = 0  # as if the failed one had been due long ago: only the agreement may notice it
    with pytest.raises(CheckpointError, match="step_00000002 was not written: rank 0: .*No space left"):
        trainer.run()
    assert trainer.progress.step == 2 and saved(config) == [1]
    assert not list((Path(config.run_dir) / "checkpoints").glob(".partial*"))  # the disk is full


def test_every_generator_goes_on_where_it_was(config: Config, mesh: Mesh) -> None:
    trained(config, mesh, 1)
    want = [torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    Trainer(config, mesh)
    got = [torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()]
    assert got == want


def test_a_manifest_says_what_made_it(config: Config, mesh: Mesh) -> None:
    trained(config, mesh, 1)
    manifest = read_manifest(Path(config.run_dir) / "checkpoints" / "step_00000001")
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", manifest.commit)
    assert manifest.versions["torch"] == torch.__version__
    assert len(manifest.identity["data"]["train_digest"]) == 64


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (flip_bit, "rank_00000.safetensors"),
        (truncate, "rank_00000.safetensors"),
        (Path.unlink, "rank_00000.safetensors"),
        (truncate, "manifest.json"),
        (flip_bit, "manifest.json"),
        (Path.unlink, "manifest.sha256"),
        (Path.unlink, "manifest.json"),
    ],
)
def test_a_damaged_newest_one_is_passed_over(
    config: Config, mesh: Mesh, capsys: pytest.CaptureFixture, damage, file: str
) -> None:  # type: ignore[no-untyped-def]
    trained(config, mesh)
    folder = Path(config.run_dir) / "checkpoints" / "step_00000002"
    damage(folder / file)
    assert newest(Path(config.run_dir)) == folder.with_name("step_00000001")
    assert "step_00000002" in capsys.readouterr().err
    assert Trainer(config, mesh).progress.step == 1


def test_no_silent_fresh_start(config: Config, mesh: Mesh) -> None:
    trained(config, mesh, 1)
    flip_bit(Path(config.run_dir) / "checkpoints" / "step_00000001" / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints is sound"):
        Trainer(config, mesh)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(Path(config.run_dir) / "checkpoints" / "step_00000001", torch.device("cpu"))


def test_an_interrupted_save_leaves_the_one_before(config: Config, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(config, mesh, 1)
    trainer.train_step()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_file", full_disk)
        with pytest.raises(CheckpointError, match="was not written: rank 0: .*No space left"):
            save(trainer)
    assert newest(Path(config.run_dir)).name == "step_00000001"
    save(trainer)  # the leftovers don't stand in the way
    assert newest(Path(config.run_dir)).name == "step_00000002"


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_a_step_whose_gradient_is_not_finite_updates_nothing(
    config: Config, mesh: Mesh, precision: str, zero: int
) -> None:
    """The loss is finite, one gradient is not: DeepSpeed reports that as -1, inf or NaN."""
    config.train.precision, config.parallel.zero_stage = precision, zero
    trainer = Trainer(config, mesh)
    trainer.train_step()
    before = masters(trainer)
    handle = trainer.engine.module.blocks[0].mixer.out_proj.weight.register_hook(lambda g: g * torch.nan)
    values = trainer.train_step()
    assert math.isfinite(values["loss"]) and math.isnan(values["grad_norm"])
    assert values["skipped"] == "the gradient is not finite"
    assert (trainer.progress.step, trainer.progress.optimizer_steps, trainer.progress.skipped_steps) == (2, 1, 1)
    assert_equal(masters(trainer), before)
    handle.remove()
    values = trainer.train_step()
    assert "skipped" not in values and trainer.progress.optimizer_steps == 2
    assert trainer.engine.optimizer_steps() == 2
    assert any(not torch.equal(a, b) for a, b in zip(masters(trainer).values(), before.values(), strict=True))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_discarded_step_is_as_if_it_had_not_been(config: Config, mesh: Mesh, zero: int) -> None:
    """Gradients of a refused batch must not leak into the next step."""
    config.parallel.zero_stage, config.train.micro_batch_size = zero, 2
    one, two = Trainer(config, mesh), Trainer(config, mesh)
    one.train_step()
    two.train_step()
    two.guard.judge_loss = lambda loss: "refused"
    assert two.train_step()["skipped"] == "refused"
    del two.guard.judge_loss
    one._advance(updated=False)  # over the batch that the other refused
    assert one.train_step() == two.train_step()
    assert_equal(masters(two), masters(one))


def masters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {f"{f.name}|{kind}": t.clone() for f in trainer.engine.fragments() for kind, t in f.tensors.items()}


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_damaged_later_checkpoints_are_set_aside(config: Config, mesh: Mesh) -> None:
    trained(config, mesh, 2)
    config.checkpoint.keep_last = 1
    folder = Path(config.run_dir) / "checkpoints"
    flip_bit(folder / "step_00000002" / "rank_00000.safetensors")
    folder.joinpath("step_00000002").rename(folder / "step_00000009")
    trainer = Trainer(config, mesh)  # goes on from step 1
    trainer.train_step()
    save(trainer)
    assert sorted(p.name for p in folder.iterdir()) == ["set_aside_step_00000009", "step_00000002"]
    assert (Path(config.run_dir) / "latest").read_text() == "step_00000002"


def test_a_shard_may_move(config: Config, mesh: Mesh, tmp_path: Path) -> None:
    trained(config, mesh, 1)
    source = Path(config.data.train)
    for file in source.parent.glob(f"{source.name}.*"):
        shutil.copy(file, tmp_path / file.name)
    config.data.train = str(tmp_path / source.name)
    assert Trainer(config, mesh).progress.step == 1


def test_another_run_is_refused_with_the_difference(config: Config, mesh: Mesh) -> None:
    trained(config, mesh, 1)
    config.optim.lr, config.model.n_layer = 1e-2, 2
    with pytest.raises(CheckpointError, match=r"model.n_layer was 1, is 2; optim.lr was 0.0003, is 0.01"):
        Trainer(config, mesh)


def test_what_may_differ_is_named(config: Config, mesh: Mesh) -> None:
    trained(config, mesh, 1)
    config.optim.lr, config.train.seed = 1e-2, 5
    with pytest.raises(CheckpointError, match=r"train.seed was 1234, is 5\. .* --allow KEY"):
        Trainer(config, mesh, allowed=["optim.lr"])
    assert Trainer(config, mesh, allowed=["optim", "train.seed"]).progress.step == 1
    with pytest.raises(ConfigError, match="--allow optim.rate: not one of data.blend"):
        Trainer(config, mesh, allowed=["optim.rate"])


def test_a_run_grows_longer_where_that_is_allowed(config: Config, mesh: Mesh, capsys: pytest.CaptureFixture) -> None:
    before = trained(config, mesh, 1).data
    config.train.total_tokens = 1280
    with pytest.raises(CheckpointError, match="train.total_tokens was 640, is 1280"):
        Trainer(config, mesh)
    trainer = Trainer(config, mesh, allowed=["train.total_tokens"])
    assert "train.total_tokens was 640, is 1280: the same samples in the same order" in capsys.readouterr().out
    [old], [new] = before.micro_batches(9), trainer.data.micro_batches(9)
    assert torch.equal(old["input_ids"], new["input_ids"])
    assert trainer.run() == "done" and trainer.progress.step == 20


@pytest.mark.parametrize("key", ["data.seqlen", "train.global_batch_size"])
def test_what_a_steps_samples_depend_on_cannot_be_allowed(config: Config, mesh: Mesh, key: str) -> None:
    trained(config, mesh, 1)
    section, name = key.split(".")
    setattr(getattr(config, section), name, 8)
    with pytest.raises(ConfigError, match=f"--allow {key}: can't change within a run"):
        Trainer(config, mesh, allowed=[key])
    with pytest.raises(CheckpointError, match=f"{key} was"):
        Trainer(config, mesh, allowed=[section])


def test_other_shapes_cannot_be_allowed(config: Config, mesh: Mesh) -> None:
    trained(config, mesh, 1)
    config.model.d_model = 64
    with pytest.raises(CheckpointError, match=r"another model's parameters: .* was \[.*\], is \["):
        Trainer(config, mesh, allowed=["model"])


def test_a_named_step_is_that_one_or_an_error(config: Config, mesh: Mesh) -> None:
    config.checkpoint.keep_last = 5
    trained(config, mesh, 3)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has 1, 2, 3"):
        Trainer(config, mesh, from_step=7)
    folder = Path(config.run_dir) / "checkpoints"
    flip_bit(folder / "step_00000002" / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match="step_00000002/rank_00000.safetensors is damaged"):
        Trainer(config, mesh, from_step=2)
    assert saved(config) == [1, 2, 3]
    assert Trainer(config, mesh, from_step=1).progress.step == 1
    assert saved(config) == [1] and (folder.parent / "latest").read_text() == "step_00000001"
    assert {p.name for p in folder.glob("set_aside_*")} == {"set_aside_step_00000002", "set_aside_step_00000003"}


def test_loaded_model_has_the_trained_weights(config: Config, mesh: Mesh) -> None:
    trainer = trained(config, mesh)
    loaded = load_model(Path(config.run_dir), torch.device("cpu"))
    assert (loaded.step, loaded.consumed_tokens, loaded.config) == (2, 128, config)
    weights = loaded.model.state_dict()
    for name, parameter in trainer.engine.module.named_parameters():
        assert torch.equal(weights[name], parameter), name
    assert loaded.model.head.weight is loaded.model.embedding.weight
    json.dumps(loaded.tokenizer)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run with checkpoints nor a checkpoint"):
        load_model(tmp_path, torch.device("cpu"))

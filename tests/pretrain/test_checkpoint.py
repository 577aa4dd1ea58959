"""Checkpoints on disk: whole or absent, verified, passed over when damaged, refused when another run's."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longhorn_layers.config import ModelConfig
from pretrain.checkpoint import save as saving
from pretrain.checkpoint import CheckpointError, load_model, newest, read_manifest
from pretrain.config import Config
from pretrain.parallel.mesh import Mesh, init_mesh
from pretrain.trainer import Trainer


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    # ZeRO-3 replaces this function for the rest of the process: give other tests torch's own back.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    with init_mesh(1) as mesh:
        yield mesh


@pytest.fixture
def config(shard, tmp_path: Path) -> Config:  # type: ignore[no-untyped-def]
    config = Config(run_dir=str(tmp_path / "run"))
    config.model = ModelConfig(vocab_size=512, d_model=32, n_layer=1)
    config.data.train, config.data.seqlen = shard.prefix, 16
    config.train.total_tokens, config.train.global_batch_size, config.train.micro_batch_size = 640, 4, 4
    config.train.precision, config.checkpoint.keep_last = "fp32", 2
    return config


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
    cache = Path(config.run_dir) / "data_cache"
    before = sorted(str(p) for p in cache.rglob("*"))
    assert Trainer(config, mesh).progress.step == 1
    assert sorted(str(p) for p in cache.rglob("*")) == before


def test_another_run_is_refused_with_the_difference(config: Config, mesh: Mesh) -> None:
    trained(config, mesh, 1)
    config.optim.lr, config.model.n_layer = 1e-2, 2
    with pytest.raises(CheckpointError, match=r"model.n_layer was 1, is 2; optim.lr was 0.0003, is 0.01"):
        Trainer(config, mesh)


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

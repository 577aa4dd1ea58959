"""A checkpoint made of a plain model: training goes on from exactly it, in any topology, on the right tokens."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from longhorn_layers.config import AttentionConfig, GLAConfig, LonghornConfig, MambaConfig, ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.checkpoint import CheckpointError, imported, load_model, verify, write_imported
from pretrain.checkpoint.format import read_manifest, write_manifest
from pretrain.config import Config
from pretrain.parallel.mesh import Mesh
from pretrain.trainer import Trainer

ROOT = Path(__file__).parents[2]
MIXERS: dict[str, Any] = {
    "longhorn": {"mixer": LonghornConfig(update="exact")},
    "mamba": {"mixer": MambaConfig()},
    "gla": {"mixer": GLAConfig(), "d_ff": 48},
    "llama": {"mixer": AttentionConfig(head_dim=8), "d_ff": 48},
}


def make_model(config: ModelConfig) -> LanguageModel:
    """Not the one that a run of any seed here would begin with."""
    torch.manual_seed(99)
    return LanguageModel(config)


def tokenizer_record(trainer: Trainer) -> dict[str, Any]:
    tokenizer = trainer.data.dataset.tokenizer
    return {name: getattr(tokenizer, name) for name in ("name", "sha256", "vocab_size", "eos_id")}


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Masters and moments, one process's fragments put together again."""
    found: dict[str, Tensor] = {}
    for fragment in trainer.engine.fragments():
        for kind, tensor in fragment.tensors.items():
            whole = found.setdefault(
                f"{fragment.name}|{kind}", torch.full((fragment.start + fragment.numel,), torch.nan)
            )
            whole[fragment.start : fragment.start + fragment.numel] = tensor
    return found


@pytest.mark.parametrize(("name", "stage"), [("longhorn", 1), ("longhorn", 3), ("mamba", 2), ("gla", 1), ("llama", 1)])
def test_training_goes_on_from_exactly_these_weights(
    name: str, stage: int, config: Config, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imported, "FILE_NUMEL", 1 << 13)  # several files, as a model of billions has
    config.model = replace(config.model, **MIXERS[name])
    config.parallel.zero_stage = stage
    model = make_model(config.model)
    folder = write_imported(Path(config.run_dir), model, config, {})
    assert len(verify(folder).files) > 1
    trainer = Trainer(config, mesh)
    assert (trainer.progress.step, trainer.saved_step) == (0, 0)
    state = state_of(trainer)
    for key, weight in model.named_parameters():
        assert torch.equal(state.pop(f"{key}|master"), weight.flatten()), key
        assert state.pop(f"{key}|exp_avg").abs().max() == state.pop(f"{key}|exp_avg_sq").abs().max() == 0
    assert not state
    assert trainer.train_step()["loss"] == pytest.approx(6.3, abs=0.4)  # ln 512


def test_the_run_may_differ_in_all_but_the_model_and_the_tokenizer(config: Config, mesh: Mesh) -> None:
    trainer = Trainer(replace(config, run_dir=config.run_dir + "_other"), mesh)
    tokenizer = tokenizer_record(trainer)
    written = replace(config, optim=replace(config.optim, lr=1e-2), data=replace(config.data, seqlen=8))
    write_imported(Path(config.run_dir), make_model(config.model), written, tokenizer)
    assert Trainer(config, mesh).progress.step == 0
    loaded = load_model(Path(config.run_dir), torch.device("cpu"))
    assert (loaded.step, loaded.consumed_tokens, loaded.tokenizer) == (0, 0, tokenizer)
    config.model.mixer = replace(config.model.mixer, update="exact")
    with pytest.raises(CheckpointError, match=r"model.mixer.update was diagonal, is exact"):
        Trainer(config, mesh)


def test_data_of_another_tokenizer_is_refused(config: Config, mesh: Mesh) -> None:
    other = {"name": "other.model", "sha256": "ab12", "vocab_size": 512, "eos_id": 2}
    write_imported(Path(config.run_dir), make_model(config.model), config, other)
    with pytest.raises(CheckpointError, match=r"tokenizer.sha256 was ab12, is [0-9a-f]{64}\. .* --allow"):
        Trainer(config, mesh)
    assert Trainer(config, mesh, allowed=["tokenizer"]).progress.step == 0


def test_a_checkpoint_from_before_a_key_of_models_resumes(config: Config, mesh: Mesh) -> None:
    folder = write_imported(Path(config.run_dir), make_model(config.model), config, {})
    manifest = read_manifest(folder)
    for model in (manifest.identity["model"], manifest.config["model"]):
        del model["d_ff"], model["mixer"]["update"]
    write_manifest(folder, manifest)
    assert Trainer(config, mesh).progress.step == 0
    config.model.mixer = replace(config.model.mixer, update="exact")  # not what such a checkpoint means
    with pytest.raises(CheckpointError, match=r"model.mixer.update was diagonal, is exact"):
        Trainer(config, mesh)


def test_what_can_not_be_imported(config: Config) -> None:
    run_dir, model = Path(config.run_dir), make_model(config.model)
    with torch.no_grad():
        model.blocks[0].mixer.D[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"blocks.0.mixer.D is not finite fp32"):
        write_imported(run_dir, model, config, {})
    with pytest.raises(CheckpointError, match=r"embedding.weight is not finite fp32"):
        write_imported(run_dir, make_model(config.model).bfloat16(), config, {})
    assert not run_dir.exists()
    write_imported(run_dir, make_model(config.model), config, {})
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        write_imported(run_dir, make_model(config.model), config, {})
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000000"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_any_topology_goes_on_alike(name: str, config: Config, tmp_path: Path) -> None:
    """Two tensor ranks, two data ranks under ZeRO-3 and one process: the same losses from the same import."""
    config.model = replace(config.model, **MIXERS[name])
    config.train.total_tokens = 192  # 3 steps
    losses = {}
    for label, options in {"tp2": ("tensor", 2), "dp2": ("zero_stage", 3), "one": ("tensor", 1)}.items():
        run = replace(config, run_dir=str(tmp_path / label), train=replace(config.train, micro_batch_size=2))
        write_imported(Path(run.run_dir), make_model(config.model), run, {})
        (tmp_path / f"{label}.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(run)))
        processes = [] if label == "one" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, *processes, "-m", "pretrain.train", str(tmp_path / f"{label}.yaml")]
        key, value = options
        done = subprocess.run(
            [*command, f"parallel.{key}={value}"], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout + done.stderr
        lines = map(json.loads, (tmp_path / label / "metrics.jsonl").read_text().splitlines())
        losses[label] = [line["loss"] for line in lines if "loss" in line]
    assert len(losses["one"]) == 3
    assert losses["tp2"] == pytest.approx(losses["one"], rel=1e-5)
    assert losses["dp2"] == pytest.approx(losses["one"], rel=1e-5)

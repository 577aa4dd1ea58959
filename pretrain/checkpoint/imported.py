"""A training checkpoint at step 0 from a plain model: what a run continues that began elsewhere."""

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_tools.files import sha256_file, sync, write_durably
from longhorn_layers.model import LanguageModel
from pretrain.checkpoint.format import (
    FORMAT_VERSION,
    CheckpointError,
    CheckpointManifest,
    Progress,
    RankFile,
    checkpoints_in,
    step_name,
    write_manifest,
)
from pretrain.checkpoint.save import PARTIAL
from pretrain.config import Config, config_to_dict
from pretrain.parallel.tensor_parallel import Sharding
from pretrain.parallel.zero import MASTER, MOMENTS
from pretrain.provenance import code_commit

FILE_NUMEL = 1 << 28  # of the masters in one file, at least: bounds the host memory that writing takes


def check_new_run(run_dir: Path) -> None:
    """Raise CheckpointError where a run has checkpoints: an import would be passed over, or set them aside."""
    if checkpoints_in(run_dir):
        raise CheckpointError(f"{run_dir} has checkpoints already; import into a new run's folder")


def write_imported(run_dir: Path, model: LanguageModel, config: Config, tokenizer: dict[str, Any]) -> Path:
    """Write RUN/checkpoints/step_00000000 from which `pretrain.train` goes on, in any topology; returns its folder.

    The masters are the model's own fp32 numbers, Adam's moments zero. Its identity holds the model and, where known,
    the tokenizer: everything else is the run's to choose.

    Raises CheckpointError where the run has checkpoints already, or a weight is not finite or not fp32.
    """
    final = run_dir / "checkpoints" / step_name(0)
    partial = final.with_name(PARTIAL + final.name)
    check_new_run(run_dir)
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32 or not weight.isfinite().all():
            raise CheckpointError(f"{name} is not finite fp32: a run could not go on from it")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed import
    partial.mkdir(parents=True)
    try:
        files = [_write_file(partial, i, weights) for i, weights in enumerate(_groups(model))]
        write_manifest(partial, _manifest(model, config, tokenizer, files))
        sync(partial)
        os.rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(final.parent)
    write_durably(run_dir / "latest", final.name.encode())
    return final


def _groups(model: LanguageModel) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        group[name] = weight.detach().cpu()
        if sum(w.numel() for w in group.values()) >= FILE_NUMEL:
            yield group
            group = {}
    if group:
        yield group


def _write_file(folder: Path, number: int, weights: dict[str, Tensor]) -> RankFile:
    """Under a name that is no rank's, as it holds no random generators' states."""
    path = folder / f"imported_{number:05d}.safetensors"
    tensors = {}
    for name, weight in weights.items():
        tensors[f"{name}|{MASTER}"] = weight.flatten()
        tensors |= {f"{name}|{moment}": torch.zeros(weight.numel()) for moment in MOMENTS}
    save_file(tensors, path)
    sync(path)
    places = {name: (0, weight.numel()) for name, weight in weights.items()}
    return RankFile(path.name, path.stat().st_size, sha256_file(path), 0, places)


def _manifest(
    model: LanguageModel, config: Config, tokenizer: dict[str, Any], files: list[RankFile]
) -> CheckpointManifest:
    values = config_to_dict(config)
    identity = {"model": values["model"]} | ({"tokenizer": {"sha256": tokenizer["sha256"]}} if tokenizer else {})
    return CheckpointManifest(
        format_version=FORMAT_VERSION,
        progress=Progress(),
        validation_loss=None,
        tensor_size=1,
        parameters={name: Sharding(list(weight.shape), None, 1) for name, weight in model.named_parameters()},
        files=files,
        identity=identity,
        config=values,
        tokenizer=tokenizer,
        commit=code_commit(),
        versions={name: version(name) for name in ("torch", "safetensors")},
    )

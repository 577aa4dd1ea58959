"""Reading: parts of parameters out of files that any topology wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from longhorn_layers.model import LanguageModel
from pretrain.checkpoint import rng
from pretrain.checkpoint.find import resolve
from pretrain.checkpoint.format import CheckpointError, CheckpointManifest, rank_file_name, read_manifest
from pretrain.config import Config, ConfigError, config_from_dict, config_to_dict, flattened
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.tensor_parallel import Sharding, shard_tensor, unshard_tensors
from pretrain.parallel.zero import MASTER, Fragment, ZeroEngine
from pretrain.say import say

# Which samples a step reads follows from these: with others, the rest of the run would repeat and miss some.
FIXED = ("data.seqlen", "train.global_batch_size")


class _Reader:
    """Parts of parameters out of a checkpoint's files, whatever ranks wrote them."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open = cache(lambda name: safe_open(folder / name, framework="pt"))

    def span(self, name: str, kind: str, tensor_rank: int, start: int, numel: int) -> Tensor:
        """[numel] of a tensor rank's flattened part, from the fragments that overlap it."""
        out = torch.full((numel,), torch.nan)
        for file in self.manifest.files:
            if file.tensor_rank != tensor_rank or name not in file.fragments:
                continue
            first, count = file.fragments[name]
            low, high = max(start, first), min(start + numel, first + count)
            if low < high:
                piece = self._open(file.name).get_slice(f"{name}|{kind}")[low - first : high - first]
                out[low - start : high - start] = piece
        return out

    def whole(self, name: str, kind: str) -> Tensor:
        """The parameter of the plain model."""
        sharding = self.manifest.parameters[name]
        numel = torch.Size(sharding.shape).numel()
        if sharding.dim is None:
            return self.span(name, kind, 0, 0, numel).view(sharding.shape)
        ranks = range(self.manifest.tensor_size)
        parts = [self.span(name, kind, rank, 0, numel).view(sharding.shape) for rank in ranks]
        return unshard_tensors(parts, sharding.dim, sharding.stride)


def load(
    engine: ZeroEngine, mesh: Mesh, folder: Path, identity: dict[str, Any], allowed: Sequence[str] = ()
) -> CheckpointManifest:
    """Write a checkpoint of any topology into the engine; returns what its manifest says.

    Of `identity`, the sections that the checkpoint names count: an imported one knows no data or optimizer. Raises
    CheckpointError where it differs in more than the keys (or their sections) `allowed`, naming each difference.
    """
    manifest = read_manifest(folder)
    saved = _with_defaults(manifest)
    both = saved.keys() & identity.keys()
    differences = _differences(*({key: side[key] for key in both} for side in (saved, identity)))
    if refused := [text for key, text in differences.items() if not _is_allowed(key, allowed)]:
        raise CheckpointError(
            f"{folder} is another run's: {'; '.join(refused)}. "
            "Resume with its config, set another run_dir, or name what may differ with --allow KEY"
        )
    if mesh.rank == 0 and (longer := differences.get("train.total_tokens")):
        say(f"{longer}: the same samples in the same order; the learning rate goes on by the new length's schedule")
    reader, shardings = _Reader(folder, manifest), engine.shardings()
    _check_parameters(folder, reader, shardings, mesh.tensor_size)
    problem = None
    for fragment in engine.fragments():
        for kind, target in fragment.tensors.items():
            source = _read_fragment(reader, mesh, shardings[fragment.name], fragment, kind)
            if source.isnan().any():
                problem = f"{folder}: {fragment.name}|{kind} is not whole, or holds NaN"
            target.copy_(source)
    if problems := [p for p in mesh.gather_objects(problem) if p]:  # all ranks stop: the next lines need all of them
        raise CheckpointError(problems[0])
    engine.masters_changed(manifest.progress.optimizer_steps)
    _restore_rng(folder, manifest, mesh)
    return manifest


def _with_defaults(manifest: CheckpointManifest) -> dict[str, Any]:
    """The identity; what its model was before a key of models existed is that key's default."""
    model = config_to_dict(config_from_dict(manifest.config))["model"]
    return manifest.identity | {"model": model}


def check_allowed(allowed: Sequence[str], identity: dict[str, Any]) -> None:
    """Raise ConfigError for a key that no identity has: a misspelt one would allow nothing."""
    known = sorted(set(flattened(identity)) - set(FIXED))
    for key in allowed:
        if key in FIXED:
            raise ConfigError(f"--allow {key}: can't change within a run, whose order of samples depends on it")
        if not any(_is_allowed(name, [key]) for name in known):
            raise ConfigError(f"--allow {key}: not one of {', '.join(known)}, nor a section of them")


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return key not in FIXED and any(key == name or key.startswith(f"{name}.") for name in allowed)


def _check_parameters(folder: Path, reader: "_Reader", now: dict[str, Sharding], tensor_size: int) -> None:
    """That allowed differences have left every parameter its shape."""
    saved = {name: _whole_shape(s, reader.manifest.tensor_size) for name, s in reader.manifest.parameters.items()}
    wanted = {name: _whole_shape(s, tensor_size) for name, s in now.items()}
    if saved != wanted:
        differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        name = differing[0]
        raise CheckpointError(
            f"{folder} holds another model's parameters: {len(differing)} differ, the first {name}: "
            f"was {saved.get(name)}, is {wanted.get(name)}"
        )


def _whole_shape(sharding: Sharding, tensor_size: int) -> list[int]:
    return [n * tensor_size if i == sharding.dim else n for i, n in enumerate(sharding.shape)]


def _restore_rng(folder: Path, manifest: CheckpointManifest, mesh: Mesh) -> None:
    """This rank's generators as it left them; a rank that the checkpoint did not have keeps its own."""
    name = rank_file_name(mesh.rank)
    if any(file.name == name for file in manifest.files):
        with safe_open(folder / name, framework="pt") as file:
            keys = [key for key in list(file.keys()) if key.startswith("rng|")]
            rng.restore({key.removeprefix("rng|"): file.get_tensor(key) for key in keys}, mesh.device)


def _read_fragment(reader: _Reader, mesh: Mesh, sharding: Sharding, fragment: Fragment, kind: str) -> Tensor:
    """[numel] of the parameter's part on this tensor rank; the whole is read only where it was cut otherwise."""
    name, manifest = fragment.name, reader.manifest
    if manifest.parameters[name] == sharding:
        rank = 0 if sharding.dim is None else mesh.tensor_rank
        return reader.span(name, kind, rank, fragment.start, fragment.numel)
    part = reader.whole(name, kind)
    if sharding.dim is not None:
        part = shard_tensor(part, sharding.dim, sharding.stride, mesh.tensor_rank, mesh.tensor_size)
    return part.flatten()[fragment.start : fragment.start + fragment.numel]


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """By dotted key: what was, what is."""
    before, after = flattened(saved), flattened(now)
    keys = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    return {key: f"{key} was {before.get(key)}, is {after.get(key)}" for key in keys}


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model on one device, in eval mode with fp32 parameters."""

    model: LanguageModel
    config: Config
    step: int
    consumed_tokens: int
    tokenizer: dict[str, Any]
    path: Path


def load_model(checkpoint: Path, device: torch.device) -> LoadedModel:
    """The plain model of a checkpoint, or of a run's newest one, whatever topology saved it.

    Raises CheckpointError where there is none, or it is damaged.
    """
    folder = resolve(checkpoint)
    manifest = read_manifest(folder)
    config = config_from_dict(manifest.config)
    with torch.device("meta"):
        model = LanguageModel(config.model)
    reader = _Reader(folder, manifest)
    weights = {name: reader.whole(name, MASTER) for name in manifest.parameters}
    if config.model.tie_embeddings:
        weights["head.weight"] = weights["embedding.weight"]
    model.load_state_dict(weights, assign=True)
    if config.model.tie_embeddings:
        model.head.weight = model.embedding.weight
    return LoadedModel(
        model.to(device).eval(),
        config,
        manifest.progress.step,
        manifest.progress.consumed_tokens,
        manifest.tokenizer,
        folder,
    )

"""Checkpoints of fragments: each rank's slices of fp32 masters and Adam's moments, with their place in the whole.

    RUN/checkpoints/step_00000500/rank_00000.safetensors   "<parameter>|<master, exp_avg or exp_avg_sq>", and "rng"
                                  manifest.json            what the fragments are, sizes and hashes, config, data
    RUN/latest                                             the newest one's name

Written under a temporary name, synced, then renamed: a folder without a complete manifest does not exist for the
loader. Fragments fit any tensor-parallel size, data-parallel size and ZeRO stage (DeepSpeed's own checkpoints do
not, and are not safe: DESIGN §10).
"""

import os
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_tools.files import sha256_file, sync, write_durably
from longhorn_layers.model import LanguageModel
from pretrain.config import Config, config_from_dict, config_to_dict
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.tensor_parallel import Sharding, shard_tensor, unshard_tensors
from pretrain.parallel.zero import MASTER, Fragment, ZeroEngine

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """No checkpoint, a damaged one, or another run's; the message names it."""


@dataclass(frozen=True)
class RankFile:
    """One rank's file; `fragments` maps a parameter's name to (start, numel) in its flattened tensor shard."""

    name: str
    size: int
    sha256: str
    tensor_rank: int
    fragments: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `optimizer_steps` is what Adam's bias correction counts."""

    step: int = 0
    consumed_tokens: int = 0
    optimizer_steps: int = 0


@dataclass(frozen=True)
class CheckpointManifest:
    """`identity` holds what a resumed run must share with this one: model, data, batch, optimizer, seed."""

    format_version: int
    progress: Progress
    tensor_size: int
    parameters: dict[str, Sharding]
    files: list[RankFile]
    identity: dict[str, Any]
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    versions: dict[str, str]


def step_name(step: int) -> str:
    return f"step_{step:08d}"


# ---- writing ----------------------------------------------------------------------------------------------------


def save(
    engine: ZeroEngine,
    mesh: Mesh,
    config: Config,
    progress: Progress,
    identity: dict[str, Any],
    tokenizer: dict[str, Any],
) -> Path:
    """Write the run's state; every rank calls it, and it returns when the checkpoint is complete.

    Raises CheckpointError on every rank if any rank could not write; what was there before stays.
    """
    root = Path(config.run_dir) / "checkpoints"
    final, partial = root / step_name(progress.step), root / f".partial_{step_name(progress.step)}"
    if mesh.rank == 0:
        for left_by_killed_save in root.glob(".partial_*"):
            shutil.rmtree(left_by_killed_save)
        partial.mkdir(parents=True)
    dist.barrier()
    entry: RankFile | str
    try:
        entry = _write_rank_file(engine, mesh, partial)
    except Exception as error:  # a full disk on one node must not leave the others waiting
        entry = f"rank {mesh.rank}: {error}"
    entries: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(entries, entry)  # also the barrier after which every file is on disk
    if errors := [e for e in entries if isinstance(e, str)]:
        raise CheckpointError(f"{final} was not written: {'; '.join(errors)}")
    if mesh.rank == 0:
        manifest = CheckpointManifest(
            format_version=FORMAT_VERSION,
            progress=progress,
            tensor_size=mesh.tensor_size,
            parameters=engine.shardings(),
            files=entries,
            identity=identity,
            config=config_to_dict(config),
            tokenizer=tokenizer,
            versions={name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
        )
        _publish(partial, final, manifest)
        _forget_old(final, config.checkpoint.keep_last)
    dist.barrier()
    return final


def _write_rank_file(engine: ZeroEngine, mesh: Mesh, folder: Path) -> RankFile:
    shardings = engine.shardings()
    # Tensor ranks hold equal copies of what is not cut: the first one's is enough.
    fragments = [f for f in engine.fragments() if mesh.tensor_rank == 0 or shardings[f.name].dim is not None]
    tensors = {f"{f.name}|{kind}": t.detach().cpu().clone() for f in fragments for kind, t in f.tensors.items()}
    tensors["rng"] = torch.get_rng_state()
    path = folder / f"rank_{mesh.rank:05d}.safetensors"
    save_file(tensors, path)
    sync(path)
    places = {f.name: (f.start, f.numel) for f in fragments}
    return RankFile(path.name, path.stat().st_size, sha256_file(path), mesh.tensor_rank, places)


def _publish(partial: Path, final: Path, manifest: CheckpointManifest) -> None:
    write_durably(partial / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    sync(partial)
    if final.exists():  # a damaged one of the same step, or a run that was set back
        shutil.rmtree(final)
    os.rename(partial, final)
    sync(final.parent)
    write_durably(final.parent.parent / "latest", final.name.encode())


def _forget_old(newest: Path, keep_last: int) -> None:
    """Keep `newest` and the ones before it. Later ones are damaged: a run goes on from its newest sound one."""
    folders = sorted(newest.parent.glob("step_*"))
    place = folders.index(newest) + 1
    for folder in folders[: max(0, place - keep_last)] + folders[place:]:
        shutil.rmtree(folder)


# ---- finding ----------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> CheckpointManifest:
    """A checkpoint's manifest. Raises CheckpointError where it is missing, unreadable or of another format."""
    path = folder / MANIFEST
    try:
        manifest = TypeAdapter(CheckpointManifest).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {manifest.format_version}; this code reads {FORMAT_VERSION}")
    return manifest


def verify(folder: Path) -> CheckpointManifest:
    """Check every file's size and hash. Raises CheckpointError naming the first that differs."""
    manifest = read_manifest(folder)
    for file in manifest.files:
        path = folder / file.name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != file.size or sha256_file(path) != file.sha256:
            raise CheckpointError(f"{path} is damaged: its size or sha256 is not the manifest's")
    return manifest


def newest(run_dir: Path) -> Path | None:
    """The newest sound checkpoint, or None where the run has none; says which damaged ones it passed over.

    Raises CheckpointError where there are checkpoints but none is sound: a run never starts anew by surprise.
    """
    folders = sorted((run_dir / "checkpoints").glob("step_*"), reverse=True)
    for folder in folders:
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            print(f"checkpoint passed over: {error}", file=sys.stderr, flush=True)
    if folders:
        raise CheckpointError(f"{run_dir}: none of its {len(folders)} checkpoints is sound; remove them to start anew")
    return None


def resolve(path: Path) -> Path:
    """A checkpoint folder as it is (verified), or the newest sound one of a run folder."""
    if (path / MANIFEST).is_file():
        verify(path)
        return path
    if (path / "checkpoints").is_dir() and (folder := newest(path)):
        return folder
    raise CheckpointError(f"{path}: neither a run with checkpoints nor a checkpoint (checkpoints/step_…)")


# ---- reading ----------------------------------------------------------------------------------------------------


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


def load(engine: ZeroEngine, mesh: Mesh, folder: Path, identity: dict[str, Any]) -> Progress:
    """Write a checkpoint of any topology into the engine; returns where it stood.

    Raises CheckpointError where `identity` differs, naming each difference.
    """
    manifest = read_manifest(folder)
    if differences := _differences(manifest.identity, identity):
        raise CheckpointError(
            f"{folder} is another run's: {'; '.join(differences)}. Resume with its config, or set another run_dir"
        )
    reader, shardings = _Reader(folder, manifest), engine.shardings()
    for fragment in engine.fragments():
        for kind, target in fragment.tensors.items():
            source = _read_fragment(reader, mesh, shardings[fragment.name], fragment, kind)
            if source.isnan().any():
                raise CheckpointError(f"{folder}: {fragment.name}|{kind} is not whole, or holds NaN")
            target.copy_(source)
    engine.masters_changed(manifest.progress.optimizer_steps)
    rng = folder / f"rank_{mesh.rank:05d}.safetensors"
    if rng.exists():
        with safe_open(rng, framework="pt") as file:
            torch.set_rng_state(file.get_tensor("rng"))
    return manifest.progress


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


def _differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(saved.keys() | now.keys()):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a}, is {b}")
    return found


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

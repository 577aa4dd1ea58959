"""Saving: a copy to host memory holds training up, a thread writes it to disk while training goes on."""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_tools.files import sha256_file, sync, write_durably
from pretrain.checkpoint import rng
from pretrain.checkpoint.find import set_aside
from pretrain.checkpoint.format import (
    FORMAT_VERSION,
    CheckpointError,
    CheckpointManifest,
    Progress,
    RankFile,
    rank_file_name,
    step_name,
    write_manifest,
)
from pretrain.checkpoint.retention import REMOVED, forget_old
from pretrain.config import Config, config_to_dict
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.zero import ZeroEngine
from pretrain.provenance import code_commit

PARTIAL = ".partial_"
Places = dict[str, tuple[int, int]]  # a parameter's name → (start, numel) of this rank's fragment


@dataclass(frozen=True)
class SaveReport:
    """A finished save: seconds that training was held (on this rank, also by a save before it) and that the write took,
    bytes of all ranks.
    """

    path: Path
    step: int
    held_seconds: float
    write_seconds: float
    size: int


class CheckpointWriter:
    """A run's saves, at most one in flight. All ranks call its methods at the same points of the run."""

    def __init__(self, mesh: Mesh, config: Config, identity: dict[str, Any], tokenizer: dict[str, Any]) -> None:
        self.mesh, self.config = mesh, config
        self.root = Path(config.run_dir) / "checkpoints"
        self._record = {
            "format_version": FORMAT_VERSION,
            "identity": identity,
            "config": config_to_dict(config),
            "tokenizer": tokenizer,
            "commit": mesh.from_first(code_commit() if mesh.rank == 0 else None),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "megatron-core", "safetensors")},
        }
        self._buffers: dict[str, Tensor] = {}  # host memory, kept between saves: its first touch costs most
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[SaveReport] | None = None

    def start(self, engine: ZeroEngine, progress: Progress, validation_loss: float | None = None) -> SaveReport | None:
        """Copy the run's state and begin to write it. Waits for the save before it and returns its report.

        Raises CheckpointError where that one failed.
        """
        started = time.perf_counter()
        earlier = self.wait()
        tensors, places = self._snapshot(engine)
        held = time.perf_counter() - started
        record = self._record | {
            "progress": progress,
            "validation_loss": validation_loss,
            "tensor_size": self.mesh.tensor_size,
            "parameters": engine.shardings(),
        }
        self._in_flight = self._thread.submit(self._write, tensors, places, record, held)
        return earlier

    def failed(self) -> bool:
        """Whether the save in flight has ended badly; `wait` raises why."""
        return self._in_flight is not None and self._in_flight.done() and self._in_flight.exception() is not None

    def finished(self) -> SaveReport | None:
        """The report of a save that has ended well since the last call, without waiting."""
        done = self._in_flight is not None and self._in_flight.done() and not self._in_flight.exception()
        return self.wait() if done else None

    def wait(self) -> SaveReport | None:
        """Until the save in flight is on disk. Raises CheckpointError on every rank where any could not write."""
        if self._in_flight is None:
            return None
        in_flight, self._in_flight = self._in_flight, None
        return in_flight.result()

    def _snapshot(self, engine: ZeroEngine) -> tuple[dict[str, Tensor], Places]:
        shardings = engine.shardings()
        # Tensor ranks hold equal copies of what is not cut: the first one's is enough.
        fragments = [f for f in engine.fragments() if self.mesh.tensor_rank == 0 or shardings[f.name].dim is not None]
        tensors = {
            f"{f.name}|{kind}": self._copy(f"{f.name}|{kind}", t) for f in fragments for kind, t in f.tensors.items()
        }
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        tensors |= {f"rng|{name}": state for name, state in rng.states(self.mesh.device).items()}
        return tensors, {f.name: (f.start, f.numel) for f in fragments}

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        """Into the key's own buffer; from a GPU without waiting for it, which pinned memory allows."""
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return self._buffers[key].copy_(tensor.detach(), non_blocking=True)

    # What follows runs in the thread, and talks to the other ranks' threads over a group of their own.

    def _write(self, tensors: dict[str, Tensor], places: Places, record: dict[str, Any], held: float) -> SaveReport:
        started, step, first = time.perf_counter(), record["progress"].step, self.mesh.rank == 0
        final, partial = self.root / step_name(step), self.root / (PARTIAL + step_name(step))
        self._together(final, lambda: self._clear() if first else None)
        try:
            files = self._together(final, lambda: self._write_rank_file(partial, tensors, places))
            manifest = CheckpointManifest(files=files, **record)
            self._together(final, lambda: self._publish(partial, final, manifest) if first else None)
        except CheckpointError:
            if first:
                shutil.rmtree(partial, ignore_errors=True)  # the disk may be full: status.json needs a little of it
            raise
        size = sum(file.size for file in files)
        return SaveReport(final, step, held, time.perf_counter() - started, size)

    def _together(self, final: Path, action: Callable[[], Any]) -> list[Any]:
        """Every rank's result of `action`. A full disk on one node must not leave the others waiting."""
        try:
            result, problem = action(), None
        except Exception as error:
            result, problem = None, f"rank {self.mesh.rank}: {error}"
        results = self.mesh.gather_objects((result, problem), self.mesh.writer_group)
        if problems := [p for _, p in results if p]:
            raise CheckpointError(f"{final} was not written: {'; '.join(problems)}")
        return [r for r, _ in results]

    def _clear(self) -> None:
        """What killed saves have left."""
        for prefix in (PARTIAL, REMOVED):
            for folder in self.root.glob(f"{prefix}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _write_rank_file(self, folder: Path, tensors: dict[str, Tensor], places: Places) -> RankFile:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite: a run could not go on from it")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / rank_file_name(self.mesh.rank)
        save_file(tensors, path)
        sync(path)
        return RankFile(path.name, path.stat().st_size, sha256_file(path), self.mesh.tensor_rank, places)

    def _publish(self, partial: Path, final: Path, manifest: CheckpointManifest) -> None:
        write_manifest(partial, manifest)
        sync(partial)
        set_aside(final)
        os.rename(partial, final)
        sync(final.parent)
        write_durably(final.parent.parent / "latest", final.name.encode())
        forget_old(final, self.config.checkpoint)

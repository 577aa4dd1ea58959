"""Training batches in an order that depends on the seed and the token count alone, and validation streams.

Order: megatron-core's GPTDataset shuffles documents and cuts them into sequences; sample i of the run is always the
same tokens, whatever the number of ranks, so a run resumes exactly from the number of samples it has consumed.
"""

import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor

from data_tools.files import sync
from data_tools.shards import Manifest, ShardPaths, open_shard
from pretrain.config import Config, ConfigError
from pretrain.parallel.mesh import Mesh
from pretrain.stop import StopRequest

IGNORED = -100  # a target that no loss counts


@dataclass(frozen=True)
class _TokenizerFacts:
    """What GPTDataset asks a tokenizer: no `pad`, so that no real token is taken for padding."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, str]


def read_manifest(prefix: str, key: str, vocab_size: int) -> Manifest:
    """The manifest of a config's shard; ConfigError (naming `key`) where it is unset or has other ids."""
    if not prefix:
        raise ConfigError(f"{key} is not set: the prefix of a shard made by `python -m data_tools.tokenize`")
    manifest = Manifest.read(ShardPaths.of(prefix).manifest)
    if manifest.tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"{key}={prefix} has ids up to {manifest.tokenizer.vocab_size - 1}, but model.vocab_size={vocab_size}; "
            f"set model.vocab_size={manifest.tokenizer.vocab_size}"
        )
    return manifest


class ShardChanged(RuntimeError):
    """The training shard is not the one that was opened: what it holds can't be trusted."""


class TrainingData:
    """The run's sequences by number: 0 … total_steps · global_batch_size − 1.

    Raises Interrupted, on every rank, where `stop` is asked for while the order is computed.
    """

    def __init__(self, config: Config, mesh: Mesh, stop: StopRequest | None = None) -> None:
        self.config, self.mesh = config, mesh
        self.manifest = read_manifest(config.data.train, "data.train", config.model.vocab_size)
        self.num_samples = config.total_steps * config.train.global_batch_size
        self.dataset = self._build(stop)
        paths = ShardPaths.of(config.data.train)
        self._opened = {path: _size_and_time(path) for path in (paths.bin, paths.idx)}

    def _build(self, stop: StopRequest | None) -> GPTDataset:
        """Rank 0 computes the order into a temporary folder and renames it; then every rank maps it.

        The folder is named by the shard's hash: GPTDataset's own cache key ignores what the files hold.
        """
        root = Path(self.config.data.cache_dir or Path(self.config.run_dir) / "data_cache")
        key = f"{self.manifest.idx_sha256[:16]}-{self.config.data.seqlen}-{self.num_samples}-{self.config.train.seed}"
        final = root / key
        problem = self._compute_order(root, final, stop) if self.mesh.rank == 0 else None
        if problem := self.mesh.from_first(problem):
            raise problem
        return self._dataset(final)

    def _compute_order(self, root: Path, final: Path, stop: StopRequest | None) -> Exception | None:
        partial = root / f"{final.name}.tmp{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same number
        try:
            if not final.exists():
                with stop.interruptible() if stop else nullcontext():
                    self._dataset(partial)
                for path in [*partial.rglob("*"), partial]:
                    sync(path)  # nothing checks it later, and a resumed run relies on it
                os.replace(partial, final)
                sync(root)
        except Exception as error:  # the others wait to hear
            shutil.rmtree(partial, ignore_errors=True)
            return None if final.exists() else error  # another job on the same cache was first
        return None

    def _dataset(self, cache: Path) -> GPTDataset:
        shard, tokenizer = open_shard(self.config.data.train), self.manifest.tokenizer
        facts = _TokenizerFacts(tokenizer.vocab_size, tokenizer.eos_id, {"sha256": tokenizer.sha256})
        dataset_config = GPTDatasetConfig(
            random_seed=self.config.train.seed,
            sequence_length=self.config.data.seqlen,
            blend=([self.config.data.train], None),
            split="1,0,0",
            path_to_cache=str(cache),
            tokenizer=facts,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = np.arange(len(shard), dtype=np.int32)
        # Named by content: GPTDataset's cache key holds this name, and a shard may move.
        return GPTDataset(shard, self.manifest.idx_sha256, documents, self.num_samples, Split.train, dataset_config)

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """This data-parallel rank's micro-batches of step `step` (from 0), in host memory: what the forward takes.

        Micro-batch i of rank r holds samples (i·ranks + r)·micro_batch_size … of the step's global batch.
        """
        for path, opened in self._opened.items():
            if (now := _size_and_time(path)) != opened:
                # Reading past the end of a mapped file would end the process with nothing but a bus error.
                raise ShardChanged(f"{path} changed while it was read: (size, mtime) was {opened}, is {now}")
        train, ranks = self.config.train, self.mesh.data_size
        first = step * train.global_batch_size
        batches = []
        for i in range(self.config.grad_accum_steps(ranks)):
            start = first + (i * ranks + self.mesh.data_rank) * train.micro_batch_size
            batches.append(self._batch(range(start, start + train.micro_batch_size)))
        return batches

    def documents(self, step: int) -> list[int]:
        """The shard's documents that step `step` reads, on all ranks, ascending."""
        size = self.config.train.global_batch_size
        samples = range(step * size, (step + 1) * size)
        return sorted({int(d) for i in samples for d in self.dataset._query_document_sample_shuffle_indices(i)[1]})

    def _batch(self, samples: range) -> dict[str, Any]:
        items = [self.dataset[i] for i in samples]
        input_ids = torch.stack([item["tokens"] for item in items])
        masks = torch.stack([item["loss_mask"] for item in items])
        targets = torch.stack([item["labels"] for item in items]).masked_fill(masks == 0, IGNORED)
        cu_seqlens = None
        if self.config.data.reset_at_eos:
            cu_seqlens = document_bounds(input_ids, self.manifest.tokenizer.eos_id)
            input_ids, targets = input_ids.reshape(1, -1), targets.reshape(1, -1)
        return {"input_ids": input_ids, "targets": targets, "cu_seqlens": cu_seqlens}


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def document_bounds(input_ids: Tensor, eos_id: int) -> Tensor:
    """cu_seqlens of (batch, seqlen) laid end to end: a bound at each row's start and after each EOS."""
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    starts[:, 0] = True
    starts[:, 1:] = input_ids[:, :-1] == eos_id
    bounds = starts.flatten().nonzero().flatten().int()
    return torch.cat([bounds, bounds.new_tensor([input_ids.numel()])])


def token_stream(prefix: str) -> np.ndarray:
    """All tokens of a shard, documents end to end with their EOS: read-only, mapped from PREFIX.bin."""
    open_shard(prefix)  # checks that sizes and counts agree with the manifest
    paths = ShardPaths.of(prefix)
    return np.memmap(paths.bin, dtype=Manifest.read(paths.manifest).dtype, mode="r")


def windows(stream: np.ndarray, context: int, indices: range) -> tuple[Tensor, Tensor]:
    """(input_ids, targets), each (len(indices), context) int64; window i reads from token i·context on.

    Windows do not overlap and every target is the token after its input, so that the same targets are scored
    whatever the context.
    """
    rows = np.stack([stream[i * context : (i + 1) * context + 1] for i in indices]).astype(np.int64)
    tokens = torch.from_numpy(rows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

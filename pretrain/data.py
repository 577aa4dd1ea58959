"""Training batches in an order that is a function of the dataset, the seed and the blend alone; validation streams.

Sample i of a run is always the same window, whatever the number of ranks and the run's length (`sample_order.py`), so
a run resumes exactly from the number of samples that it has consumed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.dataset import Dataset, Source, open_dataset
from data_tools.index import read_index
from data_tools.shards import ShardError
from pretrain.config import Config, ConfigError, DataConfig
from pretrain.packing import measure_packing
from pretrain.parallel.mesh import Mesh
from pretrain.sample_order import SampleOrder
from pretrain.shard_reader import ShardFilesReader, WindowReader

IGNORED = -100  # a target that no loss counts


def open_data(path: str, key: str, vocab_size: int) -> Dataset:
    """The dataset or shard of a config; ConfigError (naming `key`) where it is unset or has other ids."""
    if not path:
        raise ConfigError(
            f"{key} is not set: a folder made by `python -m data_tools.subset`, or the prefix of a shard made by "
            "`python -m data_tools.tokenize`"
        )
    dataset = open_dataset(path)
    if dataset.tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"{key}={path} has ids up to {dataset.tokenizer.vocab_size - 1}, but model.vocab_size={vocab_size}; "
            f"set model.vocab_size={dataset.tokenizer.vocab_size}"
        )
    return dataset


def blend_weights(data: DataConfig, windows: Mapping[str, int]) -> dict[str, Fraction]:
    """By source, parts of 1: those of `data.blend` as they are written, or by windows where it is empty.

    Raises ConfigError for a source that is not there, or has no window to give.
    """
    fits_none = f"data.train={data.train}: no window of data.seqlen={data.seqlen} fits in any shard"
    if unknown := sorted(data.blend.keys() - windows.keys()):
        raise ConfigError(f"data.blend: no source {unknown[0]!r} in {data.train}; it has {', '.join(sorted(windows))}")
    given = {name: Fraction(str(weight)) for name, weight in data.blend.items()} or windows
    if empty := sorted(name for name, weight in given.items() if weight and not windows[name]):
        raise ConfigError(f"{fits_none} of source {empty[0]!r}; take it out of data.blend")
    if not (total := Fraction(sum(given.values()))):
        raise ConfigError(fits_none)
    return {name: weight / total for name, weight in given.items()}


@dataclass(frozen=True)
class ShardDocuments:
    """Documents of one shard, by their numbers in it."""

    source: str
    shard: str
    documents: list[int]


class TrainingData:
    """A run's samples by number, from 0 on without end; reads are of one thread at a time."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.dataset = open_data(config.data.train, "data.train", config.model.vocab_size)
        self._files = ShardFilesReader(
            (s for source in self.dataset.sources for s in source.shards), self.dataset.dtype
        )
        self.sources = {s.name: WindowReader(s, config.data.seqlen, self._files) for s in self.dataset.sources}
        windows = {name: len(reader) for name, reader in self.sources.items()}
        weights = blend_weights(config.data, windows)
        self.order = SampleOrder(self.dataset.digest, config.train.seed, windows, weights)
        self._expected: dict[str, tuple[int, int]] = {}  # by source, the block that was last read from

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """This data-parallel rank's micro-batches of step `step` (from 0), in host memory: what the forward takes.

        Micro-batch i of rank r holds samples (i·ranks + r)·micro_batch_size … of the step's global batch. Raises
        ShardChanged where a file is not what it was when this was made.
        """
        train, ranks = self.config.train, self.mesh.data_size
        first = step * train.global_batch_size
        batches, touched = [], set()
        for i in range(self.config.grad_accum_steps(ranks)):
            start = first + (i * ranks + self.mesh.data_rank) * train.micro_batch_size
            rows = np.empty((train.micro_batch_size, self.config.data.seqlen + 1), self.dataset.dtype)
            for sample, row in enumerate(rows, start):
                touched.add(self._read(sample, row))
            batches.append(self._batch(torch.from_numpy(rows.astype(np.int64))))
        self._files.require_unchanged(touched)
        return batches

    def _read(self, sample: int, row: np.ndarray) -> Path:
        name, number = self.order.blend.pick(sample)
        order, reader = self.order.sources[name], self.sources[name]
        epoch, block, _ = order.place(number)
        if self._expected.get(name) != (epoch, block):
            self._expected[name] = epoch, block
            for chunk in order.chunks(epoch, block) + order.chunks(epoch, block + 1):
                reader.expect(chunk)
        return reader.read(order.window(number), row)

    def _batch(self, rows: Tensor) -> dict[str, Any]:
        input_ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        cu_seqlens = None
        if self.config.data.reset_at_eos:
            cu_seqlens = document_bounds(input_ids, self.dataset.tokenizer.eos_id)
            input_ids, targets = input_ids.reshape(1, -1), targets.reshape(1, -1)
        return {"input_ids": input_ids, "targets": targets, "cu_seqlens": cu_seqlens}

    def documents(self, step: int) -> list[ShardDocuments]:
        """The documents that step `step` reads, on all ranks."""
        size = self.config.train.global_batch_size
        windows: dict[str, list[int]] = {}
        for sample in range(step * size, (step + 1) * size):
            name, window = self.order.window(sample)
            windows.setdefault(name, []).append(window)
        return [
            ShardDocuments(name, shard, sorted(documents))
            for name in sorted(windows)
            for shard, documents in sorted(self.sources[name].documents(windows[name]).items())
        ]

    def description(self) -> Iterator[str]:
        """What the run reads, and how often: lines to print."""
        used = [reader.source for name, reader in self.sources.items() if name in self.order.sources]
        yield measure_packing(used, self.config.data.seqlen).line
        samples = self.config.total_steps * self.config.train.global_batch_size
        for name, count in self.order.blend.counts(samples).items():
            share, epochs = float(self.order.blend.weights[name]), count / self.order.sources[name].windows
            yield f"source {name}: {share:.2%} of the samples, {epochs:.3g} epochs"


def document_bounds(input_ids: Tensor, eos_id: int) -> Tensor:
    """cu_seqlens of (batch, seqlen) laid end to end: a bound at each row's start and after each EOS."""
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    starts[:, 0] = True
    starts[:, 1:] = input_ids[:, :-1] == eos_id
    bounds = starts.flatten().nonzero().flatten().int()
    return torch.cat([bounds, bounds.new_tensor([input_ids.numel()])])


def token_stream(dataset: Dataset, most: int | None = None) -> np.ndarray:
    """Tokens of a dataset, documents end to end with their EOS, read into memory.

    Args:
        most: where there are more tokens, each source gives about its share of so many, from its beginning.
    """
    wanted = dataset.tokens if most is None else min(most, dataset.tokens)
    parts: list[np.ndarray] = []
    taken = 0
    for i, source in enumerate(dataset.sources):
        upto = wanted * sum(s.tokens for s in dataset.sources[: i + 1]) // dataset.tokens
        parts += _first_tokens(source, dataset.dtype, upto - taken)
        taken = upto
    return np.concatenate([np.empty(0, dataset.dtype), *parts])


def _first_tokens(source: Source, dtype: np.dtype, count: int) -> Iterator[np.ndarray]:
    for shard in source.shards:
        here = min(count, shard.tokens)
        tokens = np.fromfile(shard.bin, dtype, here)
        if len(tokens) != here:
            raise ShardError(f"{shard.bin} was cut: it has {len(tokens)} tokens of {shard.tokens}")
        yield tokens
        count -= here


def document_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of each document, in the order of `token_stream`."""
    shards = (shard for source in dataset.sources for shard in source.shards)
    return np.concatenate([np.empty(0, np.int32), *(read_index(s.idx).sequence_lengths for s in shards)])


def windows(stream: np.ndarray, context: int, indices: range) -> tuple[Tensor, Tensor]:
    """(input_ids, targets), each (len(indices), context) int64; window i reads from token i·context on.

    Windows do not overlap and every target is the token after its input, so that the same targets are scored
    whatever the context.
    """
    rows = np.stack([stream[i * context : (i + 1) * context + 1] for i in indices]).astype(np.int64)
    tokens = torch.from_numpy(rows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

"""Order, targets and document bounds of training batches; validation windows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config import Config, ConfigError
from pretrain.data import TrainingData, document_bounds, token_stream, windows
from pretrain.parallel.mesh import init_mesh


def make_data(prefix: str, folder: Path, ranks: int = 1, rank: int = 0, **train: int) -> TrainingData:
    """One data-parallel rank's view; the mesh of this process stands in for the others' cache barrier only."""
    config = Config(run_dir=str(folder))
    config.model.vocab_size, config.data.train, config.data.seqlen = 512, prefix, 32
    config.train.global_batch_size, config.train.micro_batch_size = 12, 2
    config.train.total_tokens = 40 * 12 * 32
    for name, value in train.items():
        setattr(config.train, name, value)
    with init_mesh(1) as mesh:
        return TrainingData(config, replace(mesh, data_size=ranks, data_rank=rank))


def step_rows(views: list[TrainingData], step: int) -> torch.Tensor:
    """The rows of a step's global batch, in an order of their own."""
    rows = torch.cat([batch["input_ids"] for view in views for batch in view.micro_batches(step)])
    return torch.tensor(sorted(rows.tolist()))


def test_every_number_of_ranks_sees_the_same_global_batches(shard, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    alone = [make_data(shard.prefix, tmp_path)]
    three = [make_data(shard.prefix, tmp_path, 3, rank, micro_batch_size=4) for rank in range(3)]
    for step in (0, 1, 39):
        assert torch.equal(step_rows(alone, step), step_rows(three, step))
    assert not torch.equal(step_rows(alone, 0), step_rows(alone, 1))


def test_targets_are_the_next_tokens_and_text_is_whole(shard, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = make_data(shard.prefix, tmp_path)
    stream = token_stream(shard.prefix).astype(np.int64)
    batch = data.micro_batches(3)[0]
    assert torch.equal(batch["input_ids"][:, 1:], batch["targets"][:, :-1])
    text = stream.tobytes()
    inside = sum(row.numpy().tobytes() in text for row in batch["input_ids"])
    assert inside >= 1  # rows within a document are found in the shard as they are


def test_seed_changes_the_order_and_the_cache_follows_content(shard, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    a, b = make_data(shard.prefix, tmp_path), make_data(shard.prefix, tmp_path, seed=2)
    assert not torch.equal(step_rows([a], 0), step_rows([b], 0))
    caches = sorted(path.name for path in (tmp_path / "data_cache").iterdir())
    assert len(caches) == 2 and all(name.startswith(a.manifest.idx_sha256[:16]) for name in caches)


def test_resets_at_eos_lay_the_micro_batch_flat(shard, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = make_data(shard.prefix, tmp_path)
    data.config.data.reset_at_eos = True
    batch = data.micro_batches(0)[0]
    assert batch["input_ids"].shape == (1, 64)
    assert {0, 32, 64} <= set(batch["cu_seqlens"].tolist())


def test_document_bounds() -> None:
    ids = torch.tensor([[5, 2, 7, 8], [2, 2, 9, 2]])
    assert document_bounds(ids, eos_id=2).tolist() == [0, 2, 4, 5, 6, 8]
    assert document_bounds(ids, eos_id=2).dtype == torch.int32


def test_windows_predict_every_token_once_at_any_context() -> None:
    stream = np.arange(65, dtype=np.uint16)
    for context in (8, 16, 64):
        ids, targets = windows(stream, context, range(64 // context))
        assert ids.dtype == torch.int64
        assert ids.flatten().tolist() == list(range(64)) and targets.flatten().tolist() == list(range(1, 65))


def test_wrong_shards_are_named(shard, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="data.train is not set"):
        make_data("", tmp_path)
    config = Config(run_dir=str(tmp_path))
    config.model.vocab_size, config.data.train = 100, shard.prefix
    with init_mesh(1) as mesh, pytest.raises(ConfigError, match="set model.vocab_size=512"):
        TrainingData(config, mesh)

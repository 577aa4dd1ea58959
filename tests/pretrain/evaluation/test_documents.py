"""Which tokens are scored, of a shard and of a dataset of several sources."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_tools.dataset import Dataset, Source, open_dataset
from data_tools.shards import open_shard
from pretrain.data import token_stream
from pretrain.evaluation.documents import document_sets
from pretrain.evaluation.losses import EvaluationError
from pretrain.shard_reader import ShardChanged


@pytest.fixture
def prefix(shard) -> str:  # type: ignore[no-untyped-def]
    return shard.prefix


def longest_document(prefix: str) -> int:
    shard = open_shard(prefix)  # kept: it unmaps its lengths when it goes
    return int(shard.sequence_lengths.max())


def test_long_documents_are_whole_and_in_order(prefix: str, stream: np.ndarray) -> None:
    shard = open_shard(prefix)
    context = int(np.median(shard.sequence_lengths)) // 64 * 64
    everything, long = document_sets(open_dataset(prefix), [64, context], None)
    chosen = [i for i, length in enumerate(shard.sequence_lengths) if length >= context]
    assert 0 < len(chosen) == long.documents < everything.documents == len(shard)
    joined = np.concatenate([shard[i] for i in chosen])
    assert len(long.stream) == (len(joined) - 1) // context * context + 1
    assert np.array_equal(long.stream[:], joined[: len(long.stream)])
    assert np.array_equal(everything.stream[:], stream[: len(everything.stream)])
    assert 0 <= len(stream) - len(everything.stream) < context


def test_a_long_document_without_a_last_target_is_none(prefix: str) -> None:
    longest = longest_document(prefix)
    assert len(document_sets(open_dataset(prefix), [longest], None)) == 1
    assert len(document_sets(open_dataset(prefix), [longest - 1], None)) == 2


def test_max_tokens_bounds_each_set(prefix: str) -> None:
    assert [len(s.stream) for s in document_sets(open_dataset(prefix), [256], 1000)] == [769, 769]
    with pytest.raises(EvaluationError, match=r"shard: 201 tokens are too few for .* 256 tokens"):
        document_sets(open_dataset(prefix), [256], 200)


@pytest.fixture
def two_sources(prefix: str) -> Dataset:
    """Source "b" has two shards, "a" one: the same file, three times."""
    dataset = open_dataset(prefix)
    [source] = dataset.sources
    [shard] = source.shards
    sources = (
        Source("a", source.documents, source.tokens, (shard,)),
        Source("b", 2 * source.documents, 2 * source.tokens, (shard, shard)),
    )
    return replace(dataset, sources=sources)


def test_slices_of_a_stream_cross_files(two_sources: Dataset, stream: np.ndarray) -> None:
    [everything, *_] = document_sets(two_sources, [64], None)
    expected = token_stream(two_sources)[: len(everything.stream)]
    end = len(stream)
    for start, stop in ((0, 5), (end - 3, end + 4), (end, end + 1), (7, 2 * end + 9), (3 * end - 200, 4 * end), (5, 5)):
        assert np.array_equal(everything.stream[start:stop], expected[start:stop])


def test_each_source_gives_its_share(two_sources: Dataset, prefix: str, stream: np.ndarray) -> None:
    [everything, long] = document_sets(two_sources, [64], 640)
    assert len(everything.stream) == len(long.stream) == 641
    ends = np.cumsum(open_shard(prefix).sequence_lengths)
    begins = np.concatenate([[0], ends[:-1]])
    assert everything.documents == (begins < 213).sum() + (begins < 428).sum()
    assert np.array_equal(everything.stream[:], np.concatenate([stream[:213], stream[:428]]))


def test_a_file_that_is_cut_is_named(two_sources: Dataset, tmp_path: Path) -> None:
    [source, _] = two_sources.sources
    [shard] = source.shards
    copy = replace(shard, bin=tmp_path / "copy.bin")
    shutil.copy(shard.bin, copy.bin)
    [everything, *_] = document_sets(replace(two_sources, sources=(replace(source, shards=(copy,)),)), [64], None)
    os.truncate(copy.bin, 1000)
    with pytest.raises(ShardChanged, match=r"copy\.bin was cut"):
        everything.stream[400:600]

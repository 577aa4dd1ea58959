import os

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from data_tools.index import HEADER, index_bytes, read_index, token_dtype, write_index


def by_megatron(prefix: str, documents: list[list[list[int]]], dtype: type) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(np.concatenate(sequences).astype(dtype), [len(ids) for ids in sequences])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("lengths", [[], [1], [3, 1, 4, 1, 5], list(range(1, 60))])
def test_the_bytes_are_megatrons(tmp_path, monkeypatch, dtype, lengths):
    monkeypatch.setattr("data_tools.index.CHUNK", 7)
    by_megatron(f"{tmp_path}/theirs", [[[5] * length] for length in lengths], dtype)

    write_index(tmp_path / "ours.idx", np.dtype(dtype), np.array(lengths, "<u4"))

    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert (tmp_path / "ours.idx").stat().st_size == index_bytes(len(lengths))
    assert os.listdir(tmp_path).count("ours.idx") == 1


def test_megatron_opens_what_was_written(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "x.bin")
    write_index(tmp_path / "x.idx", np.dtype(np.uint16), np.array([4, 6]))

    dataset = IndexedDataset(f"{tmp_path}/x")

    assert [dataset[i].tolist() for i in range(len(dataset))] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]


def test_documents_of_several_sequences_are_read(tmp_path):
    by_megatron(f"{tmp_path}/x", [[[1, 2], [3]], [[4, 5, 6]]], np.int32)

    index = read_index(tmp_path / "x.idx")

    assert index.dtype == np.int32
    assert index.sequence_lengths.tolist() == [2, 1, 3]
    assert index.sequence_pointers.tolist() == [0, 8, 12]
    assert index.document_indices.tolist() == [0, 2, 3]


@pytest.mark.parametrize("vocab_size", [256, 32_000, 65_499, 65_500, 128_000])
def test_the_token_type_is_megatrons(vocab_size):
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_a_file_that_is_no_index_is_named(tmp_path):
    path = tmp_path / "x.idx"
    write_index(path, np.dtype(np.uint16), np.array([4, 6]))
    content = path.read_bytes()

    for damaged, why in [
        (content[:20], "only 20 bytes"),
        (b"X" + content[1:], "not a Megatron index"),
        (content[: HEADER.size - 17] + b"\x63" + content[HEADER.size - 16 :], "not a Megatron index"),
        (content[:-3], rf"take {len(content)} bytes; it has {len(content) - 3}"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"x.idx: .*{why}"):
            read_index(path)

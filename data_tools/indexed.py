"""megatron-core's IndexedDataset: the only place in this room that imports megatron-core.

Importing it takes seconds (it pulls in torch and most of megatron-core), so the commands import
this module late and the tokenizing workers load it once, in the server that they are forked from.
"""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np

with warnings.catch_warnings():
    # Half a dozen remarks that Transformer Engine and Apex are missing: nothing here would use
    # them.
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from data_tools.files import replace_durably
from data_tools.shards import ShardPaths, TokenType

__all__ = ["IndexedDataset", "ShardWriter", "merge_shards", "token_dtype"]


def token_dtype(vocab_size: int) -> type[np.number]:
    """Type of a stored token: uint16 below 65,500 pieces, else int32 (the format has no uint32)."""
    return DType.optimal_dtype(vocab_size)


class ShardWriter:
    """Writes ``.bin`` and ``.idx`` under other names, renamed where its ``with`` ends well."""

    def __init__(self, paths: ShardPaths, dtype: type[np.number]) -> None:
        self._final = (paths.bin, paths.idx)
        self._temporary = tuple(path.with_name(f"{path.name}.tmp{os.getpid()}") for path in self._final)
        self._dtype = dtype
        self.builder = IndexedDatasetBuilder(str(self._temporary[0]), dtype=dtype)

    def add(self, ids: list[int]) -> None:
        """Append one document of token ids."""
        self.builder.add_document(np.array(ids, dtype=self._dtype), [len(ids)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        bin_path, idx_path = self._temporary
        if kind is not None:
            self.builder.data_file.close()
            bin_path.unlink(missing_ok=True)
            return
        self.builder.finalize(str(idx_path))
        for temporary, final in zip(self._temporary, self._final, strict=True):
            replace_durably(temporary, final)


def merge_shards(parts: Iterable[Path], paths: ShardPaths, vocab_size: int) -> TokenType:
    """Join shards, given by prefix, into one in that order; returns the stored type's name."""
    dtype = token_dtype(vocab_size)
    with ShardWriter(paths, dtype) as writer:
        for prefix in parts:
            writer.builder.add_index(str(prefix))
    return "uint16" if dtype is np.uint16 else "int32"

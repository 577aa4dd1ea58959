"""Windows of a source's shards, read by offset: a file that was cut is an error, and not the end of the process."""

import os
import weakref
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_tools.dataset import Dataset, Source
from data_tools.index import read_index
from data_tools.shards import ShardFiles

MOST_OPEN = 256  # files at a time; processes may often have no more than 1024


class ShardChanged(RuntimeError):
    """A shard is not the one that was opened: what it holds can't be trusted."""


class ShardFilesReader:
    """Reads token ranges of the `.bin` files of a dataset; opens them as they are needed.

    Not for several threads at once.
    """

    def __init__(self, shards: Iterable[ShardFiles], dtype: np.dtype) -> None:
        self.dtype = dtype
        self._states = {path: _state(path) for shard in shards for path in (shard.bin, shard.idx)}
        self._open: dict[Path, int] = {}
        weakref.finalize(self, _close_all, self._open)

    def read(self, path: Path, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on. Raises ShardChanged where the file ends before."""
        try:
            done = os.preadv(self._descriptor(path), [out.data], start * self.dtype.itemsize)
        except OSError as error:  # which names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        if done != out.nbytes:
            raise ShardChanged(f"{path} was cut: it ends before token {start + len(out)}")

    def expect(self, path: Path, start: int, tokens: int) -> None:
        """Have the system read these in the background."""
        size = self.dtype.itemsize
        os.posix_fadvise(self._descriptor(path), start * size, tokens * size, os.POSIX_FADV_WILLNEED)

    def require_unchanged(self, paths: Iterable[Path]) -> None:
        """Raise ShardChanged for a file that has another size or time than when this reader was made."""
        for path in paths:
            if (now := _state(path)) != self._states[path]:
                raise ShardChanged(
                    f"{path} changed while it was read: (size, mtime) was {self._states[path]}, is {now}"
                )

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) >= MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


class WindowReader:
    """A source's windows by number: of seqlen + 1 tokens, whose last is the next one's first.

    Each shard has floor((tokens − 1) / seqlen); what is left at its end is not read.
    """

    def __init__(self, source: Source, seqlen: int, files: ShardFilesReader) -> None:
        self.source, self.seqlen, self._files = source, seqlen, files
        self._ends = list(accumulate(windows_of(shard.tokens, seqlen) for shard in source.shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, window: int) -> tuple[ShardFiles, int]:
        """The window's shard, and its first token there."""
        number = bisect_right(self._ends, window)
        before = self._ends[number - 1] if number else 0
        return self.source.shards[number], (window - before) * self.seqlen

    def read(self, window: int, out: np.ndarray) -> Path:
        """Fill `out`, (seqlen + 1,) of the dataset's type; returns the file that it came from."""
        shard, start = self.place(window)
        self._files.read(shard.bin, start, out)
        return shard.bin

    def expect(self, windows: range) -> None:
        """These will be asked for soon."""
        while windows:
            shard, start = self.place(windows.start)
            here = windows[: self._ends[bisect_right(self._ends, windows.start)] - windows.start]
            self._files.expect(shard.bin, start, len(here) * self.seqlen + 1)
            windows = windows[len(here) :]

    def documents(self, windows: Iterable[int]) -> dict[str, set[int]]:
        """By shard, the numbers of the documents that these windows have tokens of."""
        found: dict[str, set[int]] = {}
        for window in windows:
            shard, start = self.place(window)
            self._files.require_unchanged([shard.idx])  # it is mapped
            pointers, itemsize = read_index(shard.idx).sequence_pointers, self._files.dtype.itemsize
            ends = np.array([start, start + self.seqlen]) * itemsize
            first, last = (np.searchsorted(pointers, ends, side="right") - 1).tolist()
            found.setdefault(shard.bin.stem, set()).update(range(first, last + 1))
        return found


def window_counts(dataset: Dataset, seqlen: int) -> dict[str, int]:
    """How many windows each source has."""
    return {s.name: sum(windows_of(shard.tokens, seqlen) for shard in s.shards) for s in dataset.sources}


def windows_of(tokens: int, seqlen: int) -> int:
    """How many windows a shard of so many tokens has."""
    return max(tokens - 1, 0) // seqlen

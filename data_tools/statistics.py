"""Lengths of documents and frequencies of tokens by source: exact lengths, in memory that does not grow with them."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from data_tools.contents import Chunk, Contents, ShardView

DENSE = 1 << 20  # lengths below are counted in an array; of longer ones there can be few
SAMPLE_TOKENS = 1 << 22  # read for the frequencies
SAMPLE_BLOCKS = 128


@dataclass(frozen=True)
class Lengths:
    """How many documents (`counts`) have each of the lengths that occur (`values`, ascending), both int64."""

    values: np.ndarray
    counts: np.ndarray

    @property
    def documents(self) -> int:
        """Documents of any length."""
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        """Tokens of them all."""
        return int(self.values @ self.counts)

    @property
    def longest(self) -> int:
        """Tokens of the longest document, 0 where there is none."""
        return int(self.values[-1]) if len(self.values) else 0

    @property
    def median(self) -> int:
        """Tokens of the middle document (the shorter of two), 0 where there is none."""
        if not len(self.values):
            return 0
        ends = np.cumsum(self.counts)
        return int(self.values[np.searchsorted(ends, (ends[-1] + 1) // 2)])

    def at_least(self, tokens: int) -> "Lengths":
        """Those of the documents that have so many tokens."""
        start = np.searchsorted(self.values, tokens)
        return Lengths(self.values[start:], self.counts[start:])

    def histogram(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Documents and tokens with edges[i] <= length < edges[i + 1], both (len(edges) - 1,)."""
        documents, _ = np.histogram(self.values, edges, weights=self.counts)
        tokens, _ = np.histogram(self.values, edges, weights=self.counts * self.values)
        return documents, tokens

    def __add__(self, other: "Lengths") -> "Lengths":
        values, where = np.unique(np.concatenate([self.values, other.values]), return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, where, np.concatenate([self.counts, other.counts]))
        return Lengths(values, counts)


NO_LENGTHS = Lengths(np.empty(0, np.int64), np.empty(0, np.int64))


class _LengthCounter:
    def __init__(self) -> None:
        self._dense = np.zeros(DENSE, np.int64)
        self._longer: list[np.ndarray] = []

    def add(self, lengths: np.ndarray) -> None:
        counts = np.bincount(lengths[lengths < DENSE])
        self._dense[: len(counts)] += counts
        self._longer.append(lengths[lengths >= DENSE])

    def lengths(self) -> Lengths:
        short = np.flatnonzero(self._dense)
        longer, counts = np.unique(np.concatenate([NO_LENGTHS.values, *self._longer]), return_counts=True)
        return Lengths(np.concatenate([short, longer]), np.concatenate([self._dense[short], counts]))


@dataclass(frozen=True)
class Place:
    """A document: its tokens, its shard, its number there, and the number of its source."""

    tokens: int
    shard: ShardView
    document: int
    source: int


@dataclass(frozen=True)
class Survey:
    """The lengths of each source's documents, and the longest documents, the longest first."""

    lengths: list[Lengths]
    longest: list[Place]

    @cached_property
    def total(self) -> Lengths:
        """Of all sources."""
        return sum(self.lengths, start=NO_LENGTHS)


def survey(contents: Contents, longest: int) -> Survey:
    """Look at every document's length once, and keep the places of so many of the longest."""
    counters = [_LengthCounter() for _ in contents.source_names]
    found: list[Place] = []
    for shard in contents.shards:
        for chunk in shard.chunks():
            for source in np.unique(chunk.sources).tolist():
                counters[source].add(chunk.lengths[chunk.sources == source])
            if longest:
                found = _longest([*found, *_candidates(shard, chunk, found, longest)], longest)
    return Survey([counter.lengths() for counter in counters], found)


def _candidates(shard: ShardView, chunk: Chunk, found: list[Place], count: int) -> list[Place]:
    # Of equally long ones the first stay.
    floor = found[-1].tokens if len(found) == count else -1
    longer = np.flatnonzero(chunk.lengths > floor)
    chosen = longer[np.argsort(-chunk.lengths[longer], kind="stable")[:count]]
    rows = zip(chosen.tolist(), chunk.lengths[chosen].tolist(), chunk.sources[chosen].tolist(), strict=True)
    return [Place(tokens, shard, chunk.first + row, source) for row, tokens, source in rows]


def _longest(places: list[Place], count: int) -> list[Place]:
    return sorted(places, key=lambda place: -place.tokens)[:count]


def rank_frequencies(contents: Contents, budget: int = SAMPLE_TOKENS) -> list[np.ndarray]:
    """For each source how often its tokens occur in a sample, the most frequent first.

    The sample is read in blocks of consecutive documents, spread evenly over the shards.
    """
    sampled: list[list[np.ndarray]] = [[] for _ in contents.source_names]
    blocks = max(1, SAMPLE_BLOCKS // max(1, len(contents.shards)))
    size = max(1, budget // (blocks * max(1, len(contents.shards))))
    for shard in contents.shards:
        for first, end in pairwise(np.unique(np.linspace(0, len(shard), blocks + 1, dtype=np.int64)).tolist()):
            for source, ids in _block(shard, first, min(end, first + size), size):
                sampled[source].append(ids)
    return [
        np.sort(np.unique(np.concatenate(ids), return_counts=True)[1])[::-1] if ids else np.empty(0, np.int64)
        for ids in sampled
    ]


def _block(shard: ShardView, first: int, end: int, size: int) -> list[tuple[int, np.ndarray]]:
    """Ids of the documents from `first` to before `end`, up to `size` in all, by source."""
    chunk = shard.chunk(first, end)
    ends = np.cumsum(chunk.lengths)
    count = min(size, int(ends[-1]))
    needed = int(np.searchsorted(ends, count)) + 1
    sources = np.repeat(chunk.sources[:needed], chunk.lengths[:needed])[:count]
    ids = shard.read(first, count)
    return [(source, ids[sources == source]) for source in np.unique(sources).tolist()]

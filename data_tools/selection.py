"""Which documents a subset has: by their texts, the seed and the sources' shares, not by their layout in files.

Of equal documents one stays, of the source whose name sorts first; those that are in an excluded corpus go. Of each
source, documents are taken by ascending place (`places.py`) until its quota of tokens is reached, so the last one may
exceed it. A source's shard i of n starts with the first document before which there are i/n of the quota.

A source's digest is the sha256 of its documents' hashes (16 bytes each) in that order; the dataset's is the sha256 of
the lines `DIGEST  NAME`, as sha256sum prints them, of its sources sorted by name. The digest of what was excluded is
the sha256 of its hashes, each once, by place.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import orjson
from pydantic import TypeAdapter

from data_tools.duplicates import KINDS, UNIQUE, Bucket, find_duplicates
from data_tools.files import write_durably
from data_tools.jobs import Workers
from data_tools.places import keys, places
from data_tools.progress import BytesProgress
from data_tools.shards import Counts, ShardError
from data_tools.spans import EXCLUDED, Span

SHARES_TOLERANCE = 1e-6
EXAMPLES = 20


@dataclass(frozen=True)
class Request:
    """What is asked for: `tokens` is None for all there are; `proportions` are empty where they are to be kept."""

    tokens: int | None
    seed: int
    proportions: dict[str, float]
    shard_tokens: int


@dataclass(frozen=True)
class ShardPlan:
    """A shard: the place of its first document (hexadecimal), its documents and its tokens."""

    first: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class SourceChoice:
    """What a source has, loses and gives. `last` is the place of the last document taken, hexadecimal."""

    name: str
    unique: Counts
    duplicates: Counts
    overlap: Counts
    share: float
    quota: int
    taken: Counts
    digest: str
    last: str
    shards: list[ShardPlan]


@dataclass(frozen=True)
class Selection:
    """The choice for each source by name, and what the stages after it need of the stages before.

    `dropped` names files of the sorted numbers of documents that don't count; `span_tokens` are the tokens of each span
    of each group; the examples are pairs (dropped, the equal one that counts) of documents' numbers.
    """

    sources: list[SourceChoice]
    digest: str
    excluded: str | None
    duplicates: list[tuple[int, int]]
    overlap: list[tuple[int, int]]
    dropped: list[str]
    span_tokens: list[list[int]]

    @property
    def taken(self) -> Counts:
        """Of all sources."""
        return sum((source.taken for source in self.sources), start=Counts())

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_durably(path, orjson.dumps(self))

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """What was written; None where nothing was."""
        return TypeAdapter(cls).validate_json(path.read_bytes()) if path.exists() else None


def select(
    groups: Sequence[list[Span]], names: list[str], request: Request, bucket_size: int, folder: Path, workers: Workers
) -> Selection:
    """Choose among the groups' documents; files that later stages need stay in the folder.

    Args:
        names: the sources by number, from 1 on.

    Raises:
        ShardError: the rule asks for more than there is, or for sources that there are not.
    """
    buckets, span_tokens = find_duplicates(groups, request.seed, len(names) + 1, bucket_size, folder, workers)
    counts = np.sum([bucket.counts for bucket in buckets], axis=0)  # (kinds, sources, measures)
    unique, duplicates, overlap = ([Counts(*row) for row in kind.tolist()] for kind in counts)
    shares, asked = quotas(
        {name: unique[number].tokens for number, name in enumerate(names, 1)}, request.tokens, request.proportions
    )
    takers = [_Taker(quota, request) for quota in [unique[EXCLUDED].tokens, *asked.values()]]
    _take(buckets, takers)
    sources = [
        _choice(name, shares[name], takers[number], unique[number], duplicates[number], overlap[number])
        for number, name in enumerate(names, 1)
    ]
    excluded = takers[EXCLUDED]
    return Selection(
        sources,
        digest_of(sources),
        excluded.digest.hexdigest() if excluded.documents else None,
        [pair for bucket in buckets for pair in bucket.duplicates][:EXAMPLES],
        [pair for bucket in buckets for pair in bucket.overlap][:EXAMPLES],
        [bucket.dropped.name for bucket in buckets],
        span_tokens,
    )


def quotas(
    unique: Mapping[str, int], tokens: int | None, proportions: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, int]]:
    """Each source's share of the tokens asked for, and how many tokens these are.

    Args:
        unique: tokens of each source's unique documents.
        tokens: as in a request, as are the proportions.

    Raises:
        ShardError: more than there is, shares that don't add up to 1, an unknown source.
    """
    total = sum(unique.values())
    if not total:
        raise ShardError("no document is left: all are in what --exclude names")
    if not proportions:
        wanted = total if tokens is None else tokens
        if wanted > total:
            raise ShardError(f"--tokens {wanted:,}: there are {total:,} in unique documents; --tokens all takes them")
        # In whole numbers, rounded up: exact for any size, and never less than asked for.
        return {name: own / total for name, own in unique.items()}, {
            name: -(-wanted * own // total) for name, own in unique.items()
        }
    if tokens is None:
        raise ShardError("--proportions needs a number of --tokens")
    if unknown := sorted(proportions.keys() - unique.keys()):
        raise ShardError(f"--proportions: no source {unknown[0]!r}; there are {', '.join(unique)}")
    if abs(sum(proportions.values()) - 1) > SHARES_TOLERANCE:
        raise ShardError(f"--proportions add up to {sum(proportions.values()):g}, not to 1")
    shares = {name: proportions.get(name, 0.0) for name in unique}
    asked = {name: round(tokens * share) for name, share in shares.items()}
    if short := [name for name in unique if asked[name] > unique[name]]:
        fits = min(math.floor(unique[name] / share) for name, share in shares.items() if share)
        lacking = ", ".join(f"{name} has {unique[name]:,} of {asked[name]:,}" for name in short)
        raise ShardError(f"too few tokens in unique documents: {lacking}; --tokens {fits} fits these proportions")
    if not any(asked.values()):
        raise ShardError(f"--tokens {tokens:,}: no source's share of it is a token; ask for more")
    return shares, asked


def digest_of(sources: Sequence[SourceChoice]) -> str:
    """The digest of a dataset with these sources, sorted by name; those without documents don't count."""
    lines = (f"{source.digest}  {source.name}\n" for source in sources if source.taken.documents)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Taker:
    """Takes one source's unique documents, which come by ascending place, until the quota is reached."""

    def __init__(self, quota: int, request: Request) -> None:
        shards = max(1, round(quota / request.shard_tokens))
        self.quota, self._seed = quota, request.seed
        self._targets = np.array([quota * i // shards for i in range(shards)], np.int64)
        self.documents = self.tokens = self.text_bytes = 0
        self.digest = hashlib.sha256()
        self.last = b""
        self.starts: list[tuple[bytes, int, int]] = []  # of each shard: place, documents and tokens before

    def take(self, rows: np.ndarray) -> None:
        """The next documents, as `UNIQUE`."""
        before = self.tokens + np.cumsum(rows["tokens"], dtype=np.int64) - rows["tokens"]
        taken = int(np.searchsorted(before, self.quota))
        if not taken:
            return
        rows, before = rows[:taken], before[:taken]
        cuts = np.searchsorted(before, self._targets)
        self._targets = self._targets[cuts == taken]
        for cut in np.unique(cuts[cuts < taken]).tolist():
            self.starts.append((self._place(rows[cut : cut + 1]), self.documents + cut, int(before[cut])))
        self.digest.update(rows["hash"].tobytes())
        self.documents += taken
        self.tokens = int(before[-1]) + int(rows["tokens"][-1])
        self.text_bytes += int(rows["text_bytes"].sum(dtype=np.int64))
        self.last = self._place(rows[-1:])

    def _place(self, row: np.ndarray) -> bytes:
        key = keys(row["hash"]["high"].astype(np.uint64), self._seed)
        return places(key, row["hash"]["low"]).tobytes()

    def shards(self) -> list[ShardPlan]:
        """What was taken, cut."""
        bounds = pairwise([*self.starts, (b"", self.documents, self.tokens)])
        return [ShardPlan(start[0].hex(), end[1] - start[1], end[2] - start[2]) for start, end in bounds]


def _take(buckets: Sequence[Bucket], takers: Sequence[_Taker]) -> None:
    size = int(sum(bucket.counts[KINDS.index("unique"), :, 0].sum() for bucket in buckets)) * UNIQUE.itemsize
    with BytesProgress("choosing documents", size) as progress:
        for bucket in buckets:
            rows = np.fromfile(bucket.unique, UNIQUE)
            ends = np.cumsum(bucket.counts[KINDS.index("unique"), :, 0])
            for taker, part in zip(takers, np.split(rows, ends[:-1]), strict=True):
                taker.take(part)
            bucket.unique.unlink()
            progress.advance(rows.nbytes)


def _choice(
    name: str, share: float, taker: _Taker, unique: Counts, duplicates: Counts, overlap: Counts
) -> SourceChoice:
    return SourceChoice(
        name,
        unique,
        duplicates,
        overlap,
        share,
        taker.quota,
        Counts(taker.documents, taker.tokens, taker.text_bytes),
        taker.digest.hexdigest(),
        taker.last.hex(),
        taker.shards(),
    )

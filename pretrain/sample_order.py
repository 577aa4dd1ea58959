"""Which window of which source a run's sample i is: computed from the dataset's digest, a seed and i, and nothing else.

No index is made beforehand and no state is kept, so that a run may go on from any sample, on any number of ranks, and
grow longer. A source's windows are numbered across its shards. In every epoch each comes once:

1. CHUNK consecutive windows are a chunk. The epoch's chunks are permuted.
2. BLOCK_CHUNKS chunks, as they then stand, are a block, and its windows are permuted.

So windows that are read together lie in a few chunks, whose bytes the disk gives in one piece each, and a long
document's windows are spread over a block. A source smaller than a block is shuffled whole.

A permutation of n is the order of n random words, Philox's with a key that is the first 16 bytes, little-endian, of
the SHA-256 of the texts DIGEST, SEED, SOURCE, EPOCH and BLOCK (or "chunks"), joined by zero bytes. Raw words are what
numpy keeps the same for ever; its `permutation` it may change. ORDER names this rule; runs record it.
"""

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

import numpy as np

ORDER = 1
CHUNK = 512  # windows: 2 MB at 2048 tokens of two bytes
BLOCK_CHUNKS = 16
BLOCK = CHUNK * BLOCK_CHUNKS


def permutation(length: int, *key: object) -> np.ndarray:
    """(length,) int64, the same for the same key on every machine and with every numpy."""
    text = "\0".join(map(str, key)).encode()
    words = np.random.Philox(key=int.from_bytes(hashlib.sha256(text).digest()[:16], "little")).random_raw(length)
    return np.argsort(words, kind="stable")


class SourceOrder:
    """The order of one source's windows, over endless epochs. `key`: what sets it apart from others."""

    def __init__(self, windows: int, *key: object) -> None:
        self.windows, self._key = windows, key
        self._tail = windows % CHUNK or CHUNK  # of the last chunk
        # A step may end one epoch, or block, and begin the next.
        self._epoch = lru_cache(maxsize=2)(self._permuted_chunks)
        self._block = lru_cache(maxsize=2)(self._permuted_block)

    def window(self, sample: int) -> int:
        """Number of the window that is this source's sample `sample`, from 0."""
        epoch, block, offset = self.place(sample)
        return int(self._block(epoch, block)[offset])

    def place(self, sample: int) -> tuple[int, int, int]:
        """(epoch, block in it, offset in that)."""
        epoch, position = divmod(sample, self.windows)
        _, short = self._epoch(epoch)  # its block misses what the last chunk does
        missing = CHUNK - self._tail
        if position >= (short + 1) * BLOCK - missing:
            position += missing
        return epoch, position // BLOCK, position % BLOCK

    def chunks(self, epoch: int, block: int) -> list[range]:
        """The windows that a block holds, by chunk; none past the epoch's last block."""
        numbers = self._epoch(epoch)[0][block * BLOCK_CHUNKS : (block + 1) * BLOCK_CHUNKS]
        return [range(n * CHUNK, min((n + 1) * CHUNK, self.windows)) for n in numbers.tolist()]

    def _permuted_chunks(self, epoch: int) -> tuple[np.ndarray, int]:
        """The epoch's chunks in order, and the block that the last of the source, which may be short, is in."""
        count = -(-self.windows // CHUNK)
        chunks = permutation(count, *self._key, epoch, "chunks")
        return chunks, int(np.flatnonzero(chunks == count - 1)[0]) // BLOCK_CHUNKS

    def _permuted_block(self, epoch: int, block: int) -> np.ndarray:
        windows = np.concatenate([np.arange(c.start, c.stop) for c in self.chunks(epoch, block)])
        return windows[permutation(len(windows), *self._key, epoch, block)]


class Blend:
    """Deals samples out to sources by their weights, as evenly as whole numbers can be.

    Of the first n samples the first source has floor(weight · n); the rest are dealt out to the others in the same
    way. The arithmetic is exact, and every source's count is within len(weights) of its weight · n for any n.
    """

    def __init__(self, weights: Mapping[str, Fraction]) -> None:
        """`weights` add up to 1; sources without any are left out."""
        self.weights = {name: weights[name] for name in sorted(weights) if weights[name]}
        self.names = list(self.weights)
        self._shares, left = [], Fraction(1)
        for weight in self.weights.values():
            self._shares.append((weight / left).as_integer_ratio())
            left -= weight

    def pick(self, sample: int) -> tuple[str, int]:
        """The source that sample `sample` is of, and how many of it came before."""
        for name, (part, of) in zip(self.names, self._shares, strict=True):
            before = sample * part // of
            if (sample + 1) * part // of > before:
                return name, before
            sample -= before
        raise AssertionError("the last source takes all that is left")

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` each source has."""
        counts = {}
        for name, (part, of) in zip(self.names, self._shares, strict=True):
            counts[name] = samples * part // of
            samples -= counts[name]
        return counts


class SampleOrder:
    """Sample i of a run, from the sources' windows and weights."""

    def __init__(self, digest: str, seed: int, windows: Mapping[str, int], weights: Mapping[str, Fraction]) -> None:
        self.blend = Blend(weights)
        self.sources = {name: SourceOrder(windows[name], digest, seed, name) for name in self.blend.names}

    def window(self, sample: int) -> tuple[str, int]:
        """(source, number of its window)."""
        name, of_source = self.blend.pick(sample)
        return name, self.sources[name].window(of_source)

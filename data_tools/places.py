"""Where a document stands among all documents: a function of its text and the seed, and of nothing else.

A document's key is `mix(hash_high XOR mix(seed))`, in 64-bit arithmetic, with SplitMix64's finalizer as `mix`; its
place is the 16 bytes of key and hash_low, both big-endian. Places are as good as random, and different where the texts
are. A subset takes documents by ascending place, and its shards hold them in that order: a smaller subset of the same
seed is the start of each source of a larger one.
"""

import numpy as np

PLACE = np.dtype("S16")  # compares as the bytes do, so as the pair (key, hash_low)


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, a bijection of uint64 in which each input bit moves half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keys(hash_high: np.ndarray, seed: int) -> np.ndarray:
    """Keys of documents, (documents,) uint64."""
    return mix(hash_high ^ mix(np.array([seed], np.uint64)))


def places(key: np.ndarray, hash_low: np.ndarray) -> np.ndarray:
    """Places of documents, (documents,) `PLACE`."""
    return np.stack([key, hash_low], axis=1).astype(">u8").view(PLACE)[:, 0]


def buckets(key: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` (up to 65536) equal ranges each key lies in; ascending with the key."""
    return ((key >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.uint16)

import numpy as np

from data_tools.places import buckets, keys, mix, places

MASK = 2**64 - 1


def plain_mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def test_mix_is_splitmix64s():
    # The generator's first output from state 0 is the finalizer of its increment.
    assert mix(np.array([0x9E3779B97F4A7C15], np.uint64)).tolist() == [0xE220A8397B1DCDAF]


def test_keys_and_places_are_the_documented_ones():
    high, low = np.random.default_rng(0).integers(0, 2**64, (2, 500), np.uint64)
    for seed in (0, 1, MASK):
        key = keys(high, seed)

        assert key.tolist() == [plain_mix(h ^ plain_mix(seed)) for h in high.tolist()]
        expected = [k.to_bytes(8) + h.to_bytes(8) for k, h in zip(key.tolist(), low.tolist(), strict=True)]
        found = places(key, low)
        assert [found[i : i + 1].tobytes() for i in range(500)] == expected
        assert np.argsort(found).tolist() == sorted(range(500), key=expected.__getitem__)


def test_places_that_end_in_zero_bytes_keep_their_order():
    found = places(np.array([5, 5, 5, 4], np.uint64), np.array([256, 0, 255, MASK], np.uint64))

    assert np.argsort(found).tolist() == [3, 1, 2, 0]


def test_buckets_are_equal_ranges_in_the_order_of_the_keys():
    key = np.sort(np.random.default_rng(0).integers(0, 2**64, 30_000, np.uint64))
    for count in (1, 3, 1000, 65536):
        bucket = buckets(key, count)

        assert bucket.tolist() == [(k >> 32) * count >> 32 for k in key.tolist()]
    assert np.bincount(buckets(key, 3)).min() > 9500

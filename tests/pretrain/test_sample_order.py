"""The order of samples: exact, even, and the same for ever."""

from fractions import Fraction

import numpy as np
import pytest

from pretrain.sample_order import BLOCK, CHUNK, Blend, SampleOrder, SourceOrder, permutation


@pytest.mark.parametrize("windows", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 700])
def test_every_window_comes_once_an_epoch(windows: int) -> None:
    order = SourceOrder(windows, "digest", 1, "all")
    for epoch in range(3):
        drawn = [order.window(epoch * windows + i) for i in range(windows)]
        assert sorted(drawn) == list(range(windows))


def test_the_short_chunk_may_be_in_any_block() -> None:
    """20 seeds: the last chunk, of 3 windows, comes early, late and in between."""
    windows, blocks = 3 * BLOCK + 8 * CHUNK + 3, set()
    for seed in range(20):
        order = SourceOrder(windows, seed)
        places = [order.place(i) for i in range(windows)]
        blocks |= {next(b for b in range(4) if any(len(c) == 3 for c in order.chunks(0, b)))}
        for block in range(4):
            size = sum(len(chunk) for chunk in order.chunks(0, block))
            assert [p[2] for p in places if p[1] == block] == list(range(size))
    assert blocks == {0, 1, 2, 3}


def test_a_block_reads_few_places_and_epochs_differ() -> None:
    order = SourceOrder(10 * BLOCK, "digest", 1, "all")
    first = [order.window(i) for i in range(BLOCK)]
    assert len({window // CHUNK for window in first}) == BLOCK // CHUNK
    assert {window for chunk in order.chunks(0, 0) for window in chunk} == set(first)
    second = [order.window(10 * BLOCK + i) for i in range(BLOCK)]
    assert len(set(first) & set(second)) < BLOCK / 2
    assert np.corrcoef(range(BLOCK), first)[0, 1] < 0.05
    assert order.chunks(0, 10) == []


PINNED_PERMUTATION = [0, 2, 6, 7, 1, 5, 4, 3]
PINNED_SAMPLES = [
    ("web", 11108),
    ("web", 14837),
    ("web", 11777),
    ("books", 255),
    ("web", 14434),
    ("web", 14075),
    ("web", 12896),
    ("books", 242),
    ("web", 10817),
    ("web", 4563),
    ("web", 17482),
]


def test_the_order_never_changes() -> None:
    """Recorded when the order was made: a run of then goes on today. Another order needs another ORDER."""
    assert permutation(8, "a", 1).tolist() == PINNED_PERMUTATION
    order = SampleOrder("d" * 64, 1234, {"books": 700, "web": 20_000}, {"books": Fraction(1, 4), "web": Fraction(3, 4)})
    assert [order.window(i) for i in [*range(8), 4_000, 26_666, 1_000_000]] == PINNED_SAMPLES


@pytest.mark.parametrize("part", ["digest", "seed", "source"])
def test_the_order_follows_each_part_of_its_key(part: str) -> None:
    key = {"digest": "d", "seed": "1", "source": "web"}
    one, other = SourceOrder(1000, *key.values()), SourceOrder(1000, *(key | {part: "7"}).values())
    assert [one.window(i) for i in range(100)] != [other.window(i) for i in range(100)]


WEIGHTS = {"a": Fraction(1, 3), "b": Fraction("0.001"), "c": Fraction("0.25"), "d": Fraction(0)}
WEIGHTS["e"] = 1 - sum(WEIGHTS.values())


def test_samples_are_dealt_out_evenly_and_each_once() -> None:
    blend, counts = Blend(WEIGHTS), dict.fromkeys(("a", "b", "c", "e"), 0)
    for sample in range(30_000):
        assert blend.counts(sample) == counts
        name, before = blend.pick(sample)
        assert before == counts[name]
        counts[name] += 1
        assert all(abs(n - WEIGHTS[name] * (sample + 1)) < 4 for name, n in counts.items())


def test_blends_are_exact_far_on() -> None:
    blend, far = Blend(WEIGHTS), 10**12 + 7
    counts = blend.counts(far)
    assert sum(counts.values()) == far
    assert all(abs(n - WEIGHTS[name] * far) < 4 for name, n in counts.items())
    name, before = blend.pick(far)
    assert before == counts[name] and blend.counts(far + 1) == counts | {name: before + 1}


def test_in_natural_proportions_all_epochs_end_together() -> None:
    windows = {"a": 7, "b": 1_000, "c": 93}
    order = SampleOrder("d", 1, windows, {name: Fraction(n, 1_100) for name, n in windows.items()})
    for epoch in range(2):
        drawn = [order.window(epoch * 1_100 + i) for i in range(1_100)]
        assert sorted(drawn) == [(name, w) for name, n in windows.items() for w in range(n)]

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus import Piece
from data_tools.documents import DOCUMENT
from data_tools.jobs import Workers
from data_tools.places import keys
from data_tools.pool import worker_pool
from data_tools.selection import Request, Selection, quotas, select
from data_tools.shards import Counts, ShardError
from data_tools.spans import cut_groups, source_names

NAMES = ["", "Books", "C 4", "Wiki"]


@pytest.fixture(scope="module")
def pool() -> Iterator[Workers]:
    with worker_pool(1) as workers:
        yield workers


def random_rows(count: int, seed: int) -> np.ndarray:
    """Documents with few different hashes, so many are equal, and many differ in only one half of the hash."""
    random = np.random.default_rng(seed)
    rows = np.zeros(count, DOCUMENT)
    values = random.integers(0, 2**64, 60, np.uint64)
    rows["hash_high"], rows["hash_low"] = random.choice(values, count), random.choice(values[:12], count)
    # Equal documents have equal tokens.
    rows["tokens"] = 1 + (rows["hash_high"] ^ rows["hash_low"]) % np.uint64(97)
    rows["text_bytes"] = 3 * rows["tokens"]
    rows["set"] = random.integers(0, len(NAMES), count)
    return rows


def pieces_of(folder: Path, rows: np.ndarray, cuts: list[int], names: list[str] = NAMES) -> list[Piece]:
    pieces = []
    for part in np.split(rows, cuts):
        path = folder / f"{len(list(folder.glob('*.npy')))}.npy"
        np.save(path, part)
        pieces.append(Piece(path.stem, path, path, names, len(part), int(part["tokens"].sum()), path.stem))
    return pieces


def by_hand(rows: np.ndarray, excluded: np.ndarray, request: Request) -> dict[str, list[tuple[bytes, int]]]:
    """(hash, tokens) of each source's chosen documents, in order, and nothing of how the code does it."""
    out = {
        high.tobytes() + low.tobytes() for high, low in zip(excluded["hash_high"], excluded["hash_low"], strict=True)
    }
    key = keys(rows["hash_high"], request.seed).tolist()
    owner: dict[tuple[int, int, int], tuple[str, int]] = {}
    for k, row in zip(key, rows, strict=True):
        if row["hash_high"].tobytes() + row["hash_low"].tobytes() not in out:
            place, name = (k, int(row["hash_low"]), int(row["hash_high"])), NAMES[row["set"]]
            owner[place] = min(owner.get(place, (name, 0)), (name, 0))[:1] + (int(row["tokens"]),)
    total = sum(tokens for _, tokens in owner.values())
    chosen: dict[str, list[tuple[bytes, int]]] = {}
    for name in NAMES:
        own = [(place, tokens) for place, (of, tokens) in sorted(owner.items()) if of == name]
        quota, taken = -(-request.tokens * sum(t for _, t in own) // total) if request.tokens else total, 0
        chosen[name] = []
        for (_, low, high), tokens in own:
            if taken >= quota:
                break
            chosen[name].append((high.to_bytes(8) + low.to_bytes(8), tokens))
            taken += tokens
    return chosen


def run(folder: Path, pieces: list[Piece], excluded: list[Piece], request: Request, sizes: tuple, pool) -> Selection:
    folder.mkdir()
    groups = cut_groups(pieces, source_names(pieces), sizes[0])
    groups += cut_groups(excluded, None, sizes[0], sum(piece.document_count for piece in pieces))
    return select(groups, source_names(pieces), request, sizes[1], folder, pool)


@pytest.mark.parametrize("tokens", [None, 4000])
def test_it_chooses_what_the_rule_says_however_the_documents_lie(tmp_path, pool, tokens):
    rows, excluded = random_rows(900, 0), random_rows(40, 1)
    excluded[:20] = rows[:20]
    request = Request(tokens, 7, {}, 500)
    expected = by_hand(rows, excluded, request)
    out = pieces_of(tmp_path, excluded, [10], ["other", *NAMES[1:]])

    shuffled = np.random.default_rng(2).permutation(rows)
    layouts = [(rows, [], (10**6, 10**6)), (shuffled, [5, 5, 700], (64, 50)), (shuffled, [100], (101, 300))]
    found = [
        run(tmp_path / str(number), pieces_of(tmp_path, part, cuts), out, request, sizes, pool)
        for number, (part, cuts, sizes) in enumerate(layouts)
    ]

    assert all(selection.sources == found[0].sources for selection in found)
    assert len({(selection.digest, selection.excluded) for selection in found}) == 1
    lines = ""
    for source in found[0].sources:
        documents = expected[source.name]
        digest = hashlib.sha256(b"".join(text_hash for text_hash, _ in documents)).hexdigest()
        assert (source.taken.documents, source.taken.tokens) == (len(documents), sum(t for _, t in documents))
        assert source.digest == digest
        assert 0 <= source.taken.tokens - source.quota < max(t for _, t in documents) or tokens is None
        lines += f"{digest}  {source.name}\n"
    assert found[0].digest == hashlib.sha256(lines.encode()).hexdigest()
    # Every document of the input is counted once.
    for number, source in enumerate(found[0].sources):
        total = source.unique + source.duplicates + source.overlap
        own = rows[rows["set"] == number]
        assert total == Counts(len(own), int(own["tokens"].sum()), int(own["text_bytes"].sum()))
        assert source.duplicates.documents > 10 and source.overlap.documents > 0


def test_shards_begin_at_equal_parts_of_the_quota(tmp_path, pool):
    rows = random_rows(900, 3)
    selection = run(tmp_path / "w", pieces_of(tmp_path, rows, []), [], Request(None, 0, {}, 700), (10**6, 100), pool)

    for source in selection.sources:
        count = round(source.quota / 700)
        assert len(source.shards) == count > 1
        ends = np.cumsum([shard.tokens for shard in source.shards])
        assert ends[-1] == source.taken.tokens == source.quota
        assert sum(shard.documents for shard in source.shards) == source.taken.documents
        for number, end in enumerate(ends[:-1].tolist(), 1):
            assert 0 <= end - source.quota * number // count < 97
        assert [shard.first for shard in source.shards] == sorted(shard.first for shard in source.shards)


def test_a_document_longer_than_shards_makes_none_of_them_empty(tmp_path, pool):
    rows = random_rows(900, 3)
    selection = run(tmp_path / "w", pieces_of(tmp_path, rows, []), [], Request(None, 0, {}, 7), (10**6, 10**6), pool)

    shards = [shard for source in selection.sources for shard in source.shards]
    assert min(shard.documents for shard in shards) == 1
    assert len(shards) < sum(round(source.quota / 7) for source in selection.sources)


def test_a_smaller_subset_is_the_start_of_a_larger_one(tmp_path, pool):
    rows = random_rows(900, 4)
    small, large = (by_hand(rows, rows[:0], Request(tokens, 3, {}, 500)) for tokens in (1500, 6000))
    for name, tokens in (("small", 1500), ("large", 6000)):
        selection = run(
            tmp_path / name, pieces_of(tmp_path, rows, []), [], Request(tokens, 3, {}, 500), (500, 100), pool
        )
        assert selection.taken.documents == sum(map(len, (small if name == "small" else large).values()))
    assert all(small[name] == large[name][: len(small[name])] for name in NAMES)


def test_examples_name_an_equal_document(tmp_path, pool):
    rows = random_rows(300, 5)
    selection = run(tmp_path / "w", pieces_of(tmp_path, rows, []), [], Request(None, 0, {}, 500), (70, 50), pool)

    assert len(selection.duplicates) == 20
    for dropped, equal in selection.duplicates:
        first, second = rows[dropped], rows[equal]
        assert (first["hash_high"], first["hash_low"]) == (second["hash_high"], second["hash_low"])
        assert (NAMES[second["set"]], equal) < (NAMES[first["set"]], dropped)


def test_shares_are_kept_or_given():
    unique = {"a": 1000, "b": 2001}

    assert quotas(unique, None, {}) == ({"a": 1000 / 3001, "b": 2001 / 3001}, unique)
    assert quotas(unique, 10, {})[1] == {"a": 4, "b": 7}
    assert quotas(unique, 1000, {"b": 0.25, "a": 0.75})[1] == {"a": 750, "b": 250}
    assert quotas(unique, 2000, {"b": 1.0}) == ({"a": 0.0, "b": 1.0}, {"a": 0, "b": 2000})
    # Whole numbers: floats would lose the last digits.
    huge = {"a": 10**17 + 1, "b": 10**17 + 1}
    assert quotas(huge, 2 * 10**17 + 2, {})[1] == huge


@pytest.mark.parametrize(
    ("tokens", "proportions", "message"),
    [
        (3002, {}, "there are 3,001 in unique documents; --tokens all"),
        (None, {"a": 1.0}, "--proportions needs a number of --tokens"),
        (10, {"a": 0.5, "c": 0.5}, "no source 'c'; there are a, b"),
        (10, {"a": 0.5, "b": 0.4}, "add up to 0.9, not to 1"),
        (2500, {"a": 0.5, "b": 0.5}, "a has 1,000 of 1,250; --tokens 2000 fits"),
    ],
)
def test_what_can_not_be_given_is_refused(tokens, proportions, message):
    with pytest.raises(ShardError, match=message):
        quotas({"a": 1000, "b": 2001}, tokens, proportions)


def test_nothing_left_is_an_error():
    with pytest.raises(ShardError, match="no document is left"):
        quotas({"a": 0}, None, {})

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from PIL import Image

from data_tools.contents import Kind, find_kind, open_contents
from data_tools.dataset import DATASET_VERSION, DatasetManifest, Dropped, Rule, ShardRecord, SourceRecord
from data_tools.files import sha256_file
from data_tools.histograms import amount, bin_edges, draw
from data_tools.index import write_index
from data_tools.inspect import main
from data_tools.shards import Manifest, ShardPaths, open_shard
from data_tools.statistics import Lengths, rank_frequencies, survey
from data_tools.tokenize import tokenize

SPOKEN, WRITTEN = "StateOfTheUnionSpoken", "StateOfTheUnionWritten"


@pytest.fixture(scope="module")
def shard(tmp_path_factory, corpus, tokenizer_file):
    prefix = tmp_path_factory.mktemp("shard") / "train"
    tokenize([str(corpus)], str(tokenizer_file), prefix, workers=1)
    return prefix


@pytest.fixture
def copied(shard, tmp_path):
    for path in shard.parent.glob("train.*"):
        shutil.copy(path, tmp_path)
    return tmp_path / "train"


@pytest.fixture(scope="module")
def lengths(tokenizer, records):
    return [len(tokenizer.encode(record["text"])) + 1 for record in records]


@pytest.fixture
def folder(shard, tmp_path, records):
    """A dataset folder: each set's documents in two shards."""
    path, opened, manifest = tmp_path / "dataset", open_shard(shard), Manifest.read(ShardPaths.of(shard).manifest)
    path.mkdir()
    shutil.copy(ShardPaths.of(shard).tokenizer, path / "tokenizer.model")
    sources = []
    for name, counts in manifest.sets.items():
        documents = [opened[n] for n, record in enumerate(records) if record["meta"]["redpajama_set_name"] == name]
        halves = (documents[: len(documents) // 2], documents[len(documents) // 2 :])
        shards = [_write_shard(path / f"{name}-{number}", half) for number, half in enumerate(halves)]
        dropped = (Dropped(1, 10), Dropped(2, 20))
        sources.append(SourceRecord(name, "", counts.documents, counts.tokens, counts.text_bytes, *dropped, shards))
    rule = Rule(None, 7, {SPOKEN: 0.5, WRITTEN: 0.5}, 1000, None)
    totals = (manifest.documents, manifest.tokens)
    DatasetManifest(DATASET_VERSION, "ab12", rule, manifest.tokenizer, manifest.dtype, *totals, sources=sources).write(
        path / "dataset.json"
    )
    return path


def _write_shard(prefix: Path, documents: list[np.ndarray]) -> ShardRecord:
    paths = ShardPaths.of(prefix)
    paths.bin.write_bytes(b"".join(ids.tobytes() for ids in documents))
    lengths = np.array([len(ids) for ids in documents])
    write_index(paths.idx, documents[0].dtype, lengths)
    hashes = (sha256_file(paths.bin), sha256_file(paths.idx))
    return ShardRecord(prefix.name, len(documents), int(lengths.sum()), *hashes)


def megatron_shard(prefix, documents, dtype):
    """As tools/preprocess_data.py writes: a document's sentences are sequences of their own."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sentences in documents:
        builder.add_document([token for ids in sentences for token in ids], [len(ids) for ids in sentences])
    builder.finalize(f"{prefix}.idx")


def test_it_shows_counts_sets_and_decoded_samples(shard, corpus, lengths, records, capsys, tmp_path):
    assert main([str(shard), "--verify", "--sample", "2", "--plot", str(tmp_path / "p.png")]) == 0

    output = capsys.readouterr().out
    assert f"12 documents, {sum(lengths):,} tokens (uint16), one shard" in output
    assert "made from 1 source files" in output and "left out: 0 empty documents, 0 unusable records" in output
    for name in (SPOKEN, WRITTEN):
        own = [n for n, record in zip(lengths, records, strict=True) if record["meta"]["redpajama_set_name"] == name]
        share = f"{sum(own) / sum(lengths):.1%}"
        assert re.search(rf"{name} +{len(own)} +{sum(own):,} +{share}", output)
        assert re.search(rf"{name} +{sorted(own)[(len(own) - 1) // 2]:,} +{max(own):,} ", output)
    longest = lengths.index(max(lengths))
    assert f"train, document {longest}, line {longest + 1} of {corpus}" in output
    for record in (records[0], records[-1]):
        assert record["text"][:60] in output
    assert f"histograms: {tmp_path / 'p.png'}" in output and "verified: as the manifest says" in output


def test_the_longest_come_in_order_with_file_and_first_words(tmp_path, tokenizer_file, capsys):
    for name, sizes in (("a", (5, 40, 7)), ("b", (30, 6))):
        texts = [f"{name}{size} [/bold] \x1b[31m:smile: " + "word " * size for size in sizes]
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(orjson.dumps({"text": t}) + b"\n" for t in texts))
    tokenize([str(tmp_path / "*.jsonl")], str(tokenizer_file), tmp_path / "two", workers=1)

    assert main([str(tmp_path / "two"), "--longest", "3", "--sample", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("the longest documents:")
    found = [re.sub(r"^ *[\d,]+ +", "", line) for line in lines[start + 1 : start + 7 : 2]]
    assert found == [
        f"unlabelled: two, document 1, line 2 of {tmp_path / 'a.jsonl'}",
        f"unlabelled: two, document 3, line 1 of {tmp_path / 'b.jsonl'}",
        f"unlabelled: two, document 2, line 3 of {tmp_path / 'a.jsonl'}",
    ]
    # Neither markup nor escape sequences nor emoji codes of a document do anything.
    assert lines[start + 2].strip().startswith("a40 [/bold] \N{REPLACEMENT CHARACTER}[31m:smile: word word")


def test_without_a_falling_line_at_each_file_only_the_line_is_told(tmp_path, tokenizer_file, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "the second, which is longer"}\n')
    tokenize([str(tmp_path / "*.jsonl")], str(tokenizer_file), tmp_path / "two", workers=1)

    assert main([str(tmp_path / "two"), "--longest", "1"]) == 0
    assert "unlabelled: two, document 1, line 2\n" in capsys.readouterr().out


def test_a_dataset_folder_has_each_source_from_its_own_shards(folder, lengths, records, capsys):
    assert main([str(folder), "--verify", "--sample", "12"]) == 0

    output = capsys.readouterr().out
    assert f"12 documents, {sum(lengths):,} tokens (uint16), 4 shards" in output
    assert "digest ab12" in output and "all tokens, seed 7, shards of 1,000 tokens" in output
    assert "left out as duplicates: 2 documents, 20 tokens" in output
    assert "left out as overlap: 4 documents, 40 tokens" in output
    own = [n for n, record in zip(lengths, records, strict=True) if record["meta"]["redpajama_set_name"] == WRITTEN]
    assert re.search(rf"{WRITTEN} +{len(own)} +{sum(own):,} ", output)
    for record in records:
        assert record["text"][:60] in output
    assert (folder / "lengths.png").is_file() and "verified: as the manifest says" in output


def test_every_fault_of_a_dataset_folder_is_named(folder, capsys):
    flipped, cut, gone = (folder / name for name in (f"{SPOKEN}-0.bin", f"{SPOKEN}-1.idx", f"{WRITTEN}-0.bin"))
    content = bytearray(flipped.read_bytes())
    content[-2:] = b"\xff\xff"  # the last document's EOS
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    (folder / "tokenizer.model").write_bytes(b"another")
    manifest = DatasetManifest.read(folder / "dataset.json")
    replace(manifest, tokens=manifest.tokens + 1).write(folder / "dataset.json")

    assert main([str(folder), "--verify"]) == 1
    problems = capsys.readouterr().err.splitlines()
    for expected in (
        f"error: {folder}/dataset.json: all: {manifest.tokens + 1} tokens, its parts have {manifest.tokens}",
        f"error: {folder}/tokenizer.model: sha256 is {hashlib.sha256(b'another').hexdigest()}, ",
        f"error: {flipped}: sha256 is ",
        f"error: {flipped}: 1 token ids are outside the vocabulary of 600",
        f"error: {flipped}: 1 documents do not end with EOS (2), the first is ",
        f"error: {cut}: sha256 is ",
        f"error: {cut} has ",
        f"error: {gone} is missing",
    ):
        assert any(problem.startswith(expected) for problem in problems), expected
    assert len(problems) == 10  # also: one EOS too few, and the missing file has no size


def test_an_index_that_its_manifest_does_not_describe_is_a_fault(folder, capsys):
    manifest = DatasetManifest.read(folder / "dataset.json")
    record = manifest.sources[0].shards[0]
    index = folder / f"{record.name}.idx"
    lengths = np.array([record.tokens - record.documents + 1] + [1] * (record.documents - 1))
    lengths[0] -= 1  # a token fewer than in the .bin
    write_index(index, np.dtype(manifest.dtype), lengths)

    assert main([str(folder), "--verify"]) == 1
    assert f"error: {index}: an index of {record.documents} documents of {record.tokens - 1} tokens" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_shard_of_megatrons_own_opens(dtype, tmp_path, tokenizer, tokenizer_file, records, capsys):
    prefix = tmp_path / "my_text_document"
    sentences = [[tokenizer.encode(s) for s in record["text"].split(". ")[:9]] for record in records]
    sentences[0], sentences[5] = [], [[], *sentences[5]]  # a document, and a sentence, without tokens
    megatron_shard(prefix, sentences, dtype)
    counts = [sum(map(len, document)) for document in sentences]

    assert main([str(prefix), "--verify", "--sample", "12", "--longest", "1", "--tokenizer", str(tokenizer_file)]) == 0
    output = capsys.readouterr().out
    assert f"12 documents, {sum(counts):,} tokens ({np.dtype(dtype).name}), one shard" in output
    assert f"{sum(map(len, sentences))} sequences" in output
    assert f"{max(counts):,}  all: my_text_document, document {counts.index(max(counts))}\n" in output
    for document in sentences[1:]:
        assert tokenizer.decode([token for ids in document for token in ids][:30]) in output
    assert "verified: no manifest; its index and ids are sound" in output

    assert main([str(prefix)]) == 0  # without a tokenizer the ids themselves
    output = capsys.readouterr().out
    assert "tokenizer unknown (name it with --tokenizer)" in output
    assert " ".join(map(str, [token for ids in sentences[counts.index(max(counts))] for token in ids][:4])) in output


def test_faults_of_a_shard_of_megatrons_are_named(tmp_path, tokenizer_file, capsys):
    megatron_shard(tmp_path / "m", [[[1, 700, 3]], [[4, 800]]], np.int32)
    index = tmp_path / "m.idx"
    content = bytearray(index.read_bytes())
    content[34 + 2 * 4 + 8] = 4  # where the second sequence begins
    index.write_bytes(content)
    assert main([str(tmp_path / "m"), "--verify"]) == 1
    assert f"{tmp_path}/m.bin has 20 bytes; the sequences of its .idx take 12" in capsys.readouterr().err

    megatron_shard(tmp_path / "m", [[[1, 700, 3]], [[4, 800]]], np.int32)
    assert main([str(tmp_path / "m"), "--verify", "--tokenizer", str(tokenizer_file)]) == 1
    assert "m.bin: 2 token ids are outside the vocabulary of 600" in capsys.readouterr().err
    assert main([str(tmp_path / "m"), "--tokenizer", str(tokenizer_file)]) == 1
    assert "token id 700 is outside the tokenizer's 600 pieces" in capsys.readouterr().err


def test_a_shard_of_ours_without_its_manifest_is_not_taken_for_megatrons(copied, capsys):
    ShardPaths.of(copied).manifest.unlink()
    assert main([str(copied)]) == 1
    assert "train.manifest.json does not exist" in capsys.readouterr().err
    ShardPaths.of(copied).documents.unlink()
    assert find_kind(str(copied)) is Kind.MEGATRON


def test_a_tokenizer_is_only_for_shards_without_one(shard, tokenizer_file, capsys):
    assert main([str(shard), "--tokenizer", str(tokenizer_file)]) == 1
    assert "has a tokenizer of its own" in capsys.readouterr().err


def test_verify_fails_on_a_flipped_byte(copied, capsys):
    path = copied.with_suffix(".bin")
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)

    assert main([str(copied), "--verify"]) == 1
    assert f"error: {path}: sha256 is " in capsys.readouterr().err
    assert main([str(copied)]) == 0  # without --verify nothing is recomputed
    assert Path(f"{copied}.lengths.png").is_file()


def test_a_prefix_without_a_shard_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--verify"]) == 1
    assert "none.manifest.json does not exist" in capsys.readouterr().err


def test_lengths_are_exact_whatever_the_chunks(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    sizes = random.integers(0, 50, 1000)
    sizes[[10, 700]] = 3000  # beyond what is counted densely
    megatron_shard(tmp_path / "m", [[[7] * size] for size in sizes.tolist()], np.uint16)
    monkeypatch.setattr("data_tools.contents.CHUNK_DOCUMENTS", 64)
    monkeypatch.setattr("data_tools.statistics.DENSE", 40)

    found = survey(open_contents(str(tmp_path / "m")), longest=12)
    total = found.total
    assert (total.documents, total.tokens, total.longest) == (1000, sizes.sum(), 3000)
    assert total.median == np.sort(sizes)[499]
    for mark in (0, 1, 25, 45, 3000, 3001):
        long = sizes[sizes >= mark]
        assert (total.at_least(mark).documents, total.at_least(mark).tokens) == (len(long), long.sum())
    edges = bin_edges(3000)
    documents, tokens = total.histogram(edges)
    assert np.array_equal(documents, np.histogram(sizes, edges)[0]) and documents.sum() == np.count_nonzero(sizes)
    assert tokens.sum() == sizes.sum() and {2048, 8192, 32768} <= set(edges.tolist())
    expected = np.argsort(-sizes, kind="stable")[:12]
    assert [place.document for place in found.longest] == expected.tolist()


def test_frequencies_are_counted_by_source(shard, records):
    contents = open_contents(str(shard))
    frequencies = rank_frequencies(contents, budget=1 << 30)  # all of it
    opened = open_shard(shard)
    for name, counts in zip(contents.source_names, frequencies, strict=True):
        ids = [opened[n] for n, record in enumerate(records) if record["meta"]["redpajama_set_name"] == name]
        expected = np.sort(np.bincount(np.concatenate(ids)))[::-1]
        assert np.array_equal(counts, expected[expected > 0])

    few = rank_frequencies(contents, budget=1000)
    assert 0 < sum(counts.sum() for counts in few) <= 1000


def test_a_shard_without_tokens_opens(tmp_path, capsys):
    for sizes in ([], [0, 0]):
        megatron_shard(tmp_path / "m", [[[7] * size] for size in sizes], np.uint16)
        assert main([str(tmp_path / "m"), "--verify"]) == 0
        assert f"{len(sizes)} documents, 0 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (999, "999"), (999_999, "1M"), (12_345, "12.3k"), (6.27e11, "627B")]
)
def test_amounts_are_short(value, shown):
    assert amount(value) == shown


def test_the_picture_opens_and_has_all_sources(tmp_path):
    names = [f"set {number}" for number in range(9)]
    lengths = [Lengths(np.array([1 << number, 40000]), np.array([5, 1])) for number in range(9)]
    lengths[3] = Lengths(np.empty(0, np.int64), np.empty(0, np.int64))  # a set without documents
    path = tmp_path / "p.png"
    path.write_bytes(draw(names, lengths, [np.array([9, 3, 1])] * 9, "nine sets"))
    with Image.open(path) as image:
        image.load()
        assert image.width > 1000 and image.height > 800
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100

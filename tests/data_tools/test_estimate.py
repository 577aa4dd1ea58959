import dataclasses
import json
import os
from pathlib import Path
from random import Random

import pytest
import zstandard

import data_tools.estimate
from data_tools.estimate import Estimate, estimate
from data_tools.readers import find_files
from data_tools.shards import Manifest
from data_tools.tokenize import main, tokenize


@pytest.fixture
def estimated(tmp_path, tokenizer):
    """The estimate of ``input/*``."""

    def run(workers: int = 1) -> Estimate:
        return estimate(find_files([f"{tmp_path}/input/*"]), tokenizer, tmp_path / "out", workers)

    return run


@pytest.fixture
def truth(tmp_path, tokenizer_file):
    """The manifest of the shard made of ``input/*``, as far as it can be used."""

    def run() -> Manifest:
        return tokenize([f"{tmp_path}/input/*"], str(tokenizer_file), tmp_path / "out", 1, bad_dir=tmp_path / "bad")

    return run


@pytest.fixture
def mixed_input(tmp_path, records):
    """40 archives, of one document to 40 each: words of the corpus in random order, in a third of them numbers too."""
    folder = tmp_path / "input"
    folder.mkdir()
    random = Random(0)
    for number in range(40):
        lines = ""
        for _ in range(1 + number):
            words = random.choice(records)["text"].split(" ")
            random.shuffle(words)
            words = [f"{word} {random.randrange(1000)}" if number % 3 == 0 else word for word in words]
            lines += json.dumps({"text": " ".join(words)}) + "\n"
        (folder / f"{number * 7 % 40:02}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    return folder


def numbers(found: Estimate) -> tuple[int, ...]:
    return found.files, found.stored_bytes, found.text_bytes, found.documents, found.tokens


def test_a_corpus_smaller_than_the_sample_is_counted(tmp_path, estimated, truth, input_folder):
    folder = input_folder()
    found, made = estimated(), truth()
    stored = sum(path.stat().st_size for path in folder.iterdir())
    assert numbers(found) == (4, stored, made.text_bytes, made.documents, made.tokens)
    assert (found.sampled_files, found.sampled_bytes) == (4, made.text_bytes)
    of_shard = [(tmp_path / f"out.{end}").stat().st_size for end in ("bin", "documents.npy", "idx")]
    assert found.parts_bytes == pytest.approx(sum(of_shard[:2]) + 4 * 1024, abs=300)  # headers of tables
    assert found.merged_bytes == pytest.approx(sum(of_shard), abs=300)


def test_a_sample_stands_for_the_rest(estimated, truth, mixed_input, monkeypatch):
    # In proportion to the corpus as for SlimPajama: most of it is not looked at.
    monkeypatch.setattr(data_tools.estimate, "READ_BYTES", 200_000)
    monkeypatch.setattr(data_tools.estimate, "TOKENIZED_BYTES", 50_000)
    found, again, made = estimated(), estimated(), truth()
    assert numbers(found) == numbers(again)
    assert found.files == 40 and found.stored_bytes == sum(path.stat().st_size for path in mixed_input.iterdir())
    assert found.sampled_files < 17 and found.sampled_bytes < 0.4 * made.text_bytes
    assert found.text_bytes == pytest.approx(made.text_bytes, rel=0.06)
    assert found.documents == pytest.approx(made.documents, rel=0.12)  # of some 160
    assert found.tokens == pytest.approx(made.tokens, rel=0.03)
    assert found.core_seconds > 0


def test_of_a_long_file_only_the_beginning_is_read(tmp_path, estimated, records):
    (tmp_path / "input").mkdir()
    path = tmp_path / "input/a.jsonl"
    line = json.dumps(records[0]).encode() + b"\n"
    path.write_bytes(line * (data_tools.estimate.MOST_READ_BYTES // len(line)))
    os.truncate(path, 4 << 40)  # reading all of it would take an hour
    found = estimated()
    count = (4 << 40) / len(line)
    assert found.documents == pytest.approx(count, rel=1e-9)
    assert found.text_bytes == pytest.approx(count * len(records[0]["text"].encode()), rel=1e-9)
    assert found.sampled_bytes < 9e6


def test_a_long_document_is_read_to_its_end_if_that_comes_soon(tmp_path, estimated, records):
    (tmp_path / "input").mkdir()
    short, long = records[0]["text"], records[0]["text"] * 1800
    assert 8 << 20 < len(long) < 16 << 20
    for name, text in (("a", long), ("b", long * 4)):
        lines = [json.dumps({"text": text}) for text in (short, text, short)]
        (tmp_path / f"input/{name}.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))
    found = estimated()
    assert found.sampled_bytes == len(short.encode()) * 2 + len(long.encode())


def test_damage_is_passed_over(estimated, truth, input_folder, corpus):
    folder = input_folder(files=6, repeat=4)
    flipped, cut, broken, empty = (folder / f"{number}.jsonl.zst" for number in (0, 1, 2, 3))
    flipped.write_bytes(b"\0" + flipped.read_bytes()[1:])
    cut.write_bytes(zstandard.compress(corpus.read_bytes())[:-100])
    bad = '{"text": 3}\n[]\n{"text": "cut off\n\n{"text": ""}\n'
    broken.write_bytes(zstandard.compress(bad.encode() + zstandard.decompress(broken.read_bytes())))
    empty.write_bytes(b"")
    found, made = estimated(), truth()
    assert found.sampled_files == 4
    # The flipped file's bytes count as if they were like the rest.
    share = flipped.stat().st_size / found.stored_bytes
    assert share < 0.1
    assert found.tokens * (1 - share) == pytest.approx(made.tokens, rel=0.05)


def test_nothing_to_go_by(tmp_path, estimated):
    (tmp_path / "input").mkdir()
    (tmp_path / "input/a.jsonl").write_text("\n\n[]\n")
    assert estimated().lines() == [
        "input      1 files, 5 bytes as stored",
        "estimate   none: no document in the files that were looked into",
    ]


def test_disk(tmp_path, estimated, input_folder):
    input_folder()
    found = estimated()
    assert found.place == tmp_path and found.missing_bytes == 0
    assert not any("warning" in line for line in found.lines())
    needed = found.parts_bytes + found.merged_bytes
    assert dataclasses.replace(found, free_bytes=needed).missing_bytes == 0
    short = dataclasses.replace(found, free_bytes=needed - 5000)
    assert short.missing_bytes == 5000
    assert short.lines()[-1] == "warning: 5 kB too little disk for parts and merged shard"
    # What an earlier run has written need not be written again.
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts/x.bin").write_bytes(bytes(5000))
    assert dataclasses.replace(estimated(), free_bytes=needed - 5000).missing_bytes == 0


def test_workers_that_can_be_busy(estimated, input_folder):
    input_folder(files=3)
    cores = len(os.sched_getaffinity(0))
    assert estimated(workers=1).workers == 1
    assert estimated(workers=100).workers == min(3, cores)


def test_dry_run_prints_it_and_writes_nothing(tmp_path, input_folder, tokenizer_file, capsys):
    folder = input_folder()
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--input", f"{folder}/*", "--tokenizer", str(tokenizer_file), "--output", f"{tmp_path}/new/out"]
    assert main([*arguments, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "text     216 kB, 12 documents" in output and f"; {tmp_path} has " in output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_cannot_be_read_is_an_error(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        estimate([Path(tmp_path, "missing.jsonl")], tokenizer, tmp_path / "out", 1)

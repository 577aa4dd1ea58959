import gzip
import hashlib
import json
from pathlib import Path

import pytest
import zstandard

from data_tools.readers import UNLABELLED, BadLine, Document, find_files, read_documents


def line(text: str, **extra: object) -> bytes:
    return json.dumps({"text": text, **extra}).encode() + b"\n"


def texts(path: Path) -> list[str]:
    items = list(read_documents(path))
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_every_kind_of_file_gives_the_corpus(tmp_path, corpus, records, suffix):
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(pack(corpus.read_bytes()))

    documents = list(read_documents(path))

    assert [(item.text, item.set_name, item.line) for item in documents] == [
        (record["text"], record["meta"]["redpajama_set_name"], number) for number, record in enumerate(records, start=1)
    ]


def test_several_frames_and_members_are_read_whole(tmp_path):
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # what pzstd puts between frames
    frames = [zstandard.compress(line("a") + line("b")[:5]), zstandard.compress(line("b")[5:])]
    (tmp_path / "two.jsonl.zst").write_bytes(skippable.join(frames))
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(line("a")) + gzip.compress(line("b")))

    assert texts(tmp_path / "two.jsonl.zst") == ["a", "b"]
    assert texts(tmp_path / "two.jsonl.gz") == ["a", "b"]


def test_a_document_longer_than_a_chunk_and_a_last_line_without_newline(tmp_path):
    long = "word " * 200_000
    path = tmp_path / "long.jsonl"
    path.write_bytes(line("first") + line(long) + line("last").rstrip(b"\n"))

    assert texts(path) == ["first", long, "last"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "unfinished\n', "broken JSON"),
        (b'{"meta": {}}\n', "no `text`"),
        (b'{"text": 7}\n', "`text` is int, not a string"),
        (b'{"text": null}\n', "`text` is NoneType, not a string"),
        (b'["text"]\n', "a JSON list"),
        (b'{"text": "\xff"}\n', "invalid UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}\n', "broken JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_rest_is_read(tmp_path, content, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line("one") + b"\n" + content + line("four"))

    first, bad, last = read_documents(path)

    assert (first.text, last.text, last.line) == ("one", "four", 4)
    assert isinstance(bad, BadLine)
    assert str(bad).startswith(f"{path}:3: {reason}")


@pytest.mark.parametrize(("suffix", "pack"), [(".jsonl.zst", zstandard.compress), (".jsonl.gz", gzip.compress)])
def test_a_truncated_archive_gives_its_whole_lines_then_one_bad_line(tmp_path, corpus, records, suffix, pack):
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(pack(corpus.read_bytes())[:-2000])

    *documents, bad = read_documents(path)

    assert [item.text for item in documents] == [r["text"] for r in records[: len(documents)]]
    assert 0 < len(documents) < len(records)
    assert str(bad) == (
        f"{path}:{len(documents) + 1}: damaged archive: truncated: the file ends inside a compressed frame"
    )


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"this is no archive"])
def test_an_empty_or_foreign_archive_is_a_bad_line(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)

    (bad,) = read_documents(path)

    assert str(bad).startswith(f"{path}:1: damaged archive: ")


def test_on_bytes_hears_the_whole_file_even_past_damage(tmp_path, corpus):
    path = tmp_path / "damaged.jsonl.zst"
    content = bytearray(zstandard.compress(corpus.read_bytes() * 20, level=1))
    content[10] ^= 0xFF
    path.write_bytes(content + bytes(1 << 20))
    digest = hashlib.sha256()

    items = list(read_documents(path, digest.update))

    assert isinstance(items[-1], BadLine)
    assert digest.digest() == hashlib.sha256(path.read_bytes()).digest()


@pytest.mark.parametrize("meta", [None, [], {}, {"redpajama_set_name": 3}])
def test_a_document_without_a_set_name_is_unlabelled(tmp_path, meta):
    path = tmp_path / "x.jsonl"
    path.write_bytes(line("text", meta=meta))

    assert [item.set_name for item in read_documents(path)] == [UNLABELLED]


def test_find_files_sorts_and_names_what_is_wrong(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "notes.txt"):
        (tmp_path / name).touch()

    found = find_files([f"{tmp_path}/*.jsonl*", f"{tmp_path}/b.*"])

    assert [path.name for path in found] == ["a.jsonl.gz", "b.jsonl"]
    with pytest.raises(ValueError, match=r"none\*' matches no file"):
        find_files([f"{tmp_path}/*.jsonl", f"{tmp_path}/none*"])
    with pytest.raises(ValueError, match=r"notes.txt: .*\.jsonl, \.jsonl\.gz, \.jsonl\.zst"):
        find_files([f"{tmp_path}/*"])

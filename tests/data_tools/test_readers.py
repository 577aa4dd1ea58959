import gzip
import hashlib
import json
import random
import subprocess
import sys
import tracemalloc
from base64 import b64encode
from collections.abc import Callable
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
    ("content", "kind", "reason"),
    [
        (b'{"text": "unfinished', "broken JSON", "broken JSON at character 20: "),
        (b'{"text": "\\ud800"}', "broken JSON", "broken JSON at character 10: "),
        (b'{"text": "a\x00b"}', "broken JSON", "broken JSON at character 11: "),
        (b'{"text": "a"}\x00', "broken JSON", "broken JSON at character 13: "),
        (b"\x00" * 9, "broken JSON", "broken JSON at character 0: "),
        (b'\xef\xbb\xbf{"text": "not at the start"}', "broken JSON", "broken JSON at character 0: "),
        (b'{"text": "a", "n": NaN}', "broken JSON", "broken JSON at character 19: "),
        (b'{"text": "a", "n": -Infinity}', "broken JSON", "broken JSON at character 20: "),
        (b'{"text": "a", "n": 1e999}', "broken JSON", "broken JSON at character 19: "),
        (b'{"text": "a", "n": %s}' % (b"[" * 1024 + b"]" * 1024), "broken JSON", "broken JSON at character 1043: "),
        (b'{"text": "a"} {"text": "b"}', "broken JSON", "broken JSON at character 14: "),
        (b'{"text": "\xff"}', "invalid UTF-8", "invalid UTF-8 at byte 10 of the line"),
        (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8", "invalid UTF-8 at byte 10 of the line"),
        (b'["text"]', "not an object", "a JSON list, not an object with a `text`"),
        (b"null", "not an object", "a JSON NoneType, not an object with a `text`"),
        (b'{"meta": {}}', "no text", "no `text`"),
        (b'{"text": 7}', "text not a string", "`text` is int, not a string"),
        (b'{"text": null}', "text not a string", "`text` is NoneType, not a string"),
        (b'{"text": "word %s"}' % (b"word " * 40), "line too long", "line too long: more than 200 bytes"),
    ],
)
def test_a_bad_line_is_named_with_its_bytes_and_the_rest_is_read(tmp_path, content, kind, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line("one") + b"\n" + content + b"\n" + line("four"))

    first, bad, last = read_documents(path, max_line_bytes=200 if kind == "line too long" else 1 << 20)

    assert (first.text, last.text, last.line) == ("one", "four", 4)
    assert isinstance(bad, BadLine)
    assert (bad.path, bad.line, bad.kind, bad.raw) == (str(path), 3, kind, content)
    assert str(bad) == f"{path}:3: {bad.reason}"
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"text": ""}', ""),
        (b'{"text": " \\n\\t"}', " \n\t"),
        (b'{"text": "a\\u0000b"}', "a\0b"),
        (b'{"text": "</s>\\ud83d\\ude00"}', "</s>😀"),
        (b'{"text": "first", "text": "last"}', "last"),
        (b' \t{"text": "spaces around"} \r', "spaces around"),
        (b'{"text": "huge", "n": 123456789012345678901234567890, "m": 1e-999}', "huge"),
        (b'{"text": "deep", "n": %s}' % (b"[" * 1000 + b"]" * 1000), "deep"),
        (b'{"text": "\x7f\xc2\x80\xef\xbb\xbf"}', "\x7f\x80\ufeff"),
    ],
)
def test_unusual_lines_that_are_documents(tmp_path, content, text):
    path = tmp_path / "unusual.jsonl"
    path.write_bytes(line("one") + content + b"\n" + line("three"))

    assert texts(path) == ["one", text, "three"]


def test_byte_order_mark_crlf_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\r\\n"}\r\n\r\n \t\r\n{"text": "four"}\r\n\n')

    assert [(item.text, item.line) for item in read_documents(path)] == [("one\r\n", 1), ("four", 4)]
    path.write_bytes(b"\xef\xbb\xbf")
    assert texts(path) == []


@pytest.mark.parametrize("end", [b"\n", b""])
def test_the_longest_line_and_one_byte_more(tmp_path, end):
    path = tmp_path / "long.jsonl.zst"
    longest = line("x" * 300_000).rstrip()
    path.write_bytes(zstandard.compress(longest + b"\n" + longest + b" \n" + line("three") + longest + b" " + end))

    first, second, third, fourth = read_documents(path, max_line_bytes=len(longest))

    assert (first.text, third.text) == ("x" * 300_000, "three")
    for bad, number in [(second, 2), (fourth, 4)]:
        assert (bad.line, bad.kind, bad.raw) == (number, "line too long", longest[:1024])


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_a_truncated_archive_gives_its_whole_lines_then_one_bad_line(tmp_path, corpus, records, suffix):
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(PACK[suffix](corpus.read_bytes())[:-2000])

    *documents, bad = read_documents(path)

    assert [item.text for item in documents] == [r["text"] for r in records[: len(documents)]]
    assert 0 < len(documents) < len(records)
    assert str(bad) == (
        f"{path}:{len(documents) + 1}: damaged archive: truncated: the file ends at byte {path.stat().st_size}, "
        "inside the compressed frame that begins at byte 0"
    )
    assert corpus.read_bytes().splitlines()[len(documents)].startswith(bad.raw)


@pytest.mark.parametrize("suffix", PACK)
def test_of_a_line_without_end_in_a_truncated_archive_the_beginning_is_kept(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(PACK[suffix](line("one") + b"x" * 300_000)[:-1])

    document, bad = read_documents(path, max_line_bytes=2000)

    assert (document.text, bad.kind, bad.raw) == ("one", "damaged archive", b"x" * 1024)


@pytest.mark.parametrize("suffix", PACK)
def test_nothing_of_a_corrupted_frame_or_past_it_comes_out(tmp_path, records, suffix):
    # The last bytes are the checksum: all that went before has been decompressed when the fault shows.
    first, second, third = (PACK[suffix](content) for content in (line("a") + b'{"te', b'xt": "b"}\n', line("c")))
    path = tmp_path / f"corrupt{suffix}"
    path.write_bytes(first + second[:-5] + bytes([second[-5] ^ 1]) + second[-4:] + third)

    document, bad = read_documents(path)

    assert (document.text, bad.line, bad.kind, bad.raw) == ("a", 2, "damaged archive", b'{"te')
    assert f"in the frame that begins at byte {len(first)}" in bad.reason


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_a_long_line_takes_little_more_than_its_bytes_the_parsers_copy_and_the_text(tmp_path, suffix):
    path, size = tmp_path / f"long{suffix}", 100_000_000
    text = b64encode(random.Random(0).randbytes(size * 3 // 4)).decode()
    path.write_bytes(PACK.get(suffix, bytes)(line("one") + line(text) + line("three")))
    measure = """if True:
        import sys
        from pathlib import Path
        from data_tools.readers import read_documents
        def peak():
            return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
        before = peak()
        assert sum(len(item.text) for item in read_documents(Path(sys.argv[1]))) == int(sys.argv[2]) + 8
        print(peak() - before)
    """

    run = subprocess.run(
        [sys.executable, "-c", measure, str(path), str(size)], check=True, capture_output=True, text=True
    )

    assert int(run.stdout) < 3.3 * size


@pytest.mark.parametrize("suffix", PACK)
def test_a_small_file_that_expands_without_end_is_one_bad_line(tmp_path, suffix):
    path, size = tmp_path / f"bomb{suffix}", 1 << 29
    path.write_bytes(PACK[suffix](bytes(size)))
    tracemalloc.start()

    try:
        (bad,) = read_documents(path, max_line_bytes=1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert (bad.kind, bad.raw) == ("line too long", bytes(1001))
    assert path.stat().st_size < size / 1000
    assert peak < 200 << 20


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "unreadable.jsonl"
    path.symlink_to("/proc/self/mem")  # opens, and gives an I/O error

    with pytest.raises(OSError, match="unreadable.jsonl"):
        list(read_documents(path))


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


def test_a_name_that_looks_like_a_glob_and_a_file_by_two_paths_are_found_once(tmp_path, monkeypatch):
    for name in ("x1.jsonl", "x[1].jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    assert [path.name for path in find_files(["x1.jsonl", "x[1].jsonl"])] == ["x1.jsonl", "x[1].jsonl"]
    assert len(find_files(["*.jsonl", f"{tmp_path}/*.jsonl"])) == 2

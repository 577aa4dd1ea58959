import os
from pathlib import Path

import orjson
import pytest
import zstandard

from data_tools.quarantine import Quarantine, main, quarantine_path, read_quarantine
from data_tools.readers import BadLine, Document, read_documents

BAD = [
    BadLine("in/a.jsonl", 2, "invalid UTF-8", "invalid UTF-8 at byte 10 of the line", b'{"text": "\xff"}'),
    BadLine("in/a.jsonl", 5, "no text", "no `text`", b'{"text\xc3\xa4": "\\u0000"}'),
    BadLine("in/a.jsonl", 9, "invalid UTF-8", "invalid UTF-8 at byte 0 of the line", b"\x00\xfe" * 200_000),
    BadLine("in/a.jsonl", 11, "damaged archive", "damaged archive: truncated", b""),
]


def test_records_come_back_as_they_were(tmp_path):
    folder = tmp_path / "not" / "there"
    with Quarantine(folder, "name") as quarantine:
        for bad in BAD:
            quarantine.add(bad)

    assert os.listdir(folder) == ["name.bad.jsonl.zst"]
    assert list(read_quarantine(quarantine_path(folder, "name"))) == BAD


def test_a_record_is_a_json_object_a_line_with_the_bytes_as_base64(tmp_path):
    with Quarantine(tmp_path, "name") as quarantine:
        quarantine.add(BAD[0])
        quarantine.add(BAD[3])

    first, second = zstandard.open(tmp_path / "name.bad.jsonl.zst").read().splitlines()

    assert orjson.loads(first) == {
        "path": "in/a.jsonl",
        "line": 2,
        "kind": "invalid UTF-8",
        "reason": "invalid UTF-8 at byte 10 of the line",
        "raw": "eyJ0ZXh0IjogIv8ifQ==",
    }
    assert orjson.loads(second)["raw"] == ""


def test_equal_records_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        with Quarantine(tmp_path, name) as quarantine:
            for bad in BAD:
                quarantine.add(bad)

    assert quarantine_path(tmp_path, "a").read_bytes() == quarantine_path(tmp_path, "b").read_bytes()


def test_what_a_reader_rejects_is_kept_byte_for_byte(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [b'{"text": "fine"}', b'{"text": "\xc3"}', b'{"text": 3}\r', b"\x00\x01\x02", b'{"text": "fine"}']
    path.write_bytes(b"\n".join(lines))
    with Quarantine(tmp_path, "in") as quarantine:
        for item in read_documents(path):
            if not isinstance(item, Document):
                quarantine.add(item)

    records = list(read_quarantine(quarantine_path(tmp_path, "in")))

    assert [(record.path, record.line, record.raw) for record in records] == [
        (str(path), number, lines[number - 1]) for number in (2, 3, 4)
    ]


def left_by_an_earlier_attempt(folder: Path) -> None:
    with Quarantine(folder, "a[1]") as quarantine:
        quarantine.add(BAD[0])
    quarantine_path(folder, "a[1]").with_suffix(".zst.tmp123").touch()
    quarantine_path(folder, "a1").touch()  # another file's


def test_without_bad_records_there_is_no_file_and_an_old_one_goes(tmp_path):
    left_by_an_earlier_attempt(tmp_path)
    with Quarantine(tmp_path, "a[1]"):
        pass

    assert os.listdir(tmp_path) == ["a1.bad.jsonl.zst"]


def test_after_an_exception_nothing_is_left(tmp_path):
    left_by_an_earlier_attempt(tmp_path)
    with pytest.raises(KeyboardInterrupt), Quarantine(tmp_path, "a[1]") as quarantine:
        quarantine.add(BAD[0])
        raise KeyboardInterrupt

    assert os.listdir(tmp_path) == ["a1.bad.jsonl.zst"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Quarantine(None, "name"):
        pass

    assert os.listdir(tmp_path) == []
    with pytest.raises(AssertionError, match="without a folder"), Quarantine(None, "name") as quarantine:
        quarantine.add(BAD[0])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{tmp_path}/file"), Quarantine(tmp_path / "file", "name") as quarantine:
        quarantine.add(BAD[0])


def test_the_command_counts_by_kind_and_shows_the_first_records(tmp_path, capsys):
    with Quarantine(tmp_path, "a") as quarantine:
        for bad in BAD:
            quarantine.add(bad)
    with Quarantine(tmp_path, "b") as quarantine:
        quarantine.add(BAD[1])
        quarantine.add(BAD[1])

    assert main([str(quarantine_path(tmp_path, name)) for name in "ab"]) == 0

    table, *shown = capsys.readouterr().out.split("\n\n")
    assert [line.split(maxsplit=1) for line in table.splitlines()] == [
        ["3", "no text"],
        ["2", "invalid UTF-8"],
        ["1", "damaged archive"],
        ["6", "in all"],
    ]
    assert len(shown) == 5
    assert shown[0].splitlines() == [
        "in/a.jsonl:2: invalid UTF-8 at byte 10 of the line",
        '    b\'{"text": "\\xff"}\'',
    ]
    assert shown[2].endswith("…")


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        zstandard.compress(b"no JSON\n"),
        zstandard.compress(b'{"text": "another file"}\n'),
        zstandard.compress(b"[1]\n"),
        zstandard.compress(b'{"path":"a","line":1,"kind":"k","reason":"r","raw":"!"}\n'),
    ],
)
def test_another_file_is_named(tmp_path, capsys, content):
    path = tmp_path / "other.bad.jsonl.zst"
    path.write_bytes(content)

    assert main([str(path)]) == 1

    assert capsys.readouterr().err.startswith(f"error: {path}: not a file of quarantined records: ")

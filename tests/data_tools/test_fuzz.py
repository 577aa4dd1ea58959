"""Thousands of damaged inputs: every line is accounted for, and no document comes out that did not go in.

Two kinds of damage. To lines: what each is turned into is known, so what comes out must be just that.
To the bytes of a file: what comes out of an archive must be a beginning of what went in, as long as
the damage allows, with a bad line for the rest. A failed assertion shows its input's seed.
"""

import gzip
import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Self, get_args

import numpy as np
import pytest
import zstandard

import data_tools.archives
from data_tools.documents import open_documents, text_hash
from data_tools.parts import PartJob, PartPaths, make_part
from data_tools.quarantine import quarantine_path, read_quarantine
from data_tools.readers import UNLABELLED, BadKind, BadLine, Document, read_documents

Item = Document | BadLine
MAX_LINE_BYTES = 4000
ANY_REASON = ""
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.fixture(scope="module")
def texts(records) -> list[str]:
    """Passages of the corpus, and some text beyond ASCII."""
    rng = random.Random(0)
    starts = [(record["text"], rng.randrange(len(record["text"]))) for record in records * 4]
    return [text[start : start + rng.randint(1, 300)] for text, start in starts] + ["Übermut “tut” 选 gut 😀"] * 8


@dataclass(frozen=True)
class Line:
    """A line of an input without its line end, and what it must give: a text, a kind of bad line, or nothing."""

    content: bytes
    text: str | None = None
    bad: BadKind | None = None
    set_name: str = UNLABELLED

    def item(self, path: Path, number: int) -> Item | None:
        if self.bad:
            return BadLine(str(path), number, self.bad, ANY_REASON, shown(self.content))
        return None if self.text is None else Document(self.text, self.set_name, number)


def document(text: str, rng: random.Random) -> Line:
    set_name = rng.choice(["Book", "ArXiv", UNLABELLED])
    record = {"text": text} if set_name == UNLABELLED else {"text": text, "meta": {"redpajama_set_name": set_name}}
    return Line(json.dumps(record, ensure_ascii=rng.random() < 0.5).encode(), text, set_name=set_name)


def insert(content: bytes, what: bytes, rng: random.Random) -> bytes:
    place = rng.randint(0, len(content))
    return content[:place] + what + content[place:]


def unusual(line: Line, rng: random.Random) -> Line:
    """A line that must still give its document, or a blank one."""
    text = rng.choice(["", " ", "\n\n", "\0", "</s>", "<s>[INST] </s> <unk>", "\ufeff", "\x85\u2028 "]) + line.text
    content, twice = json.dumps(text).encode(), json.dumps({"text": 7}).encode()[:-1]
    return rng.choice(
        [
            Line(b'{"text":""}', ""),
            Line(b'{"text":%s}' % content, text),
            Line(b'{"text":%s}\r' % content, text),
            Line(b' \t{ "text" : %s } ' % content, text),
            Line(b'{"n":%s,"text":%s,"deep":%s1%s}' % (b"9" * 30, content, b"[" * 99, b"]" * 99), text),
            Line(twice + b',"text":%s}' % content, text),
            Line(rng.choice([b"", b" ", b"\r", b"\t \r"])),
        ]
    )


def broken(line: Line, rng: random.Random) -> Line:
    """A line that must give a bad line."""
    whole, quoted = line.content, json.dumps(line.text).encode()
    cut = whole.decode()[: rng.randrange(1, len(whole.decode()))].encode()
    other = rng.choice([b"7", b"null", b"true", b"1.5e3", b"[%s]" % quoted, b'{"text":%s}' % quoted])
    return rng.choice(
        [
            Line(cut, bad="broken JSON"),
            Line(cut + bytes(rng.randint(1, 9)), bad="broken JSON"),
            Line(b'{"text":"\0"}' + bytes(rng.randint(0, 9)), bad="broken JSON"),
            Line(whole + whole, bad="broken JSON"),
            Line(whole[:-1] + b',"n":%s}' % rng.choice([b"NaN", b"Infinity", b"1e999", b"01", b""]), bad="broken JSON"),
            Line(b'{"text":"\\u%s"}' % rng.choice([b"d800", b"dc00", b"d8", b"zzzz"]), bad="broken JSON"),
            Line(b'{"text":%s1%s}' % (b"[" * 1500, b"]" * 1500), bad="broken JSON"),
            Line(b"\xef\xbb\xbf \xef\xbb\xbf" + whole, bad="broken JSON"),
            Line(insert(whole, rng.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\x80"]), rng), bad="invalid UTF-8"),
            Line(rng.choice([quoted, b"[%s]" % whole, b"7", b"null", b"true"]), bad="not an object"),
            Line(b'{"Text":%s}' % quoted, bad="no text"),
            Line(b"{}", bad="no text"),
            Line(b'{"text":%s}' % other, bad="text not a string"),
            Line(whole + b" " * MAX_LINE_BYTES, bad="line too long"),
            Line(b"\xff" * (MAX_LINE_BYTES + rng.randint(1, 999)), bad="line too long"),
        ]
    )


def planted(texts: list[str], rng: random.Random) -> list[Line]:
    """An input's lines, about half of them as a corpus should have them."""
    lines = [document(text, rng) for text in rng.sample(texts, rng.randint(1, 16))]
    for index, line in enumerate(lines):
        if change := rng.choice([None, None, unusual, broken]):
            lines[index] = change(line, rng)
    mark = rng.choice([b"", b"\xef\xbb\xbf"])
    return [replace(lines[0], content=mark + lines[0].content), *lines[1:]]


def joined(lines: list[Line], rng: random.Random) -> bytes:
    return b"\n".join(line.content for line in lines) + rng.choice([b"\n", b""])


def shown(raw: bytes) -> bytes:
    return raw if len(raw) <= MAX_LINE_BYTES else raw[:1024]


def cut(content: bytes, rng: random.Random) -> list[bytes]:
    """The content in up to five slices, cut anywhere, also inside a line or a character."""
    places = sorted(rng.choices(range(len(content) + 1), k=rng.randint(0, 4)))
    return [content[start:end] for start, end in zip([0, *places], [*places, len(content)], strict=True)]


def packed(content: bytes, suffix: str, rng: random.Random) -> bytes:
    return content if suffix == ".jsonl" else b"".join(map(COMPRESS[suffix], cut(content, rng)))


def expected(lines: list[Line], path: Path) -> list[Item]:
    items = (line.item(path, number) for number, line in enumerate(lines, start=1))
    return [item for item in items if item]


def read(path: Path) -> list[Item]:
    return list(read_documents(path, max_line_bytes=MAX_LINE_BYTES))


def without_reasons(items: list[Item]) -> list[Item]:
    return [replace(item, reason=ANY_REASON) if isinstance(item, BadLine) else item for item in items]


@pytest.mark.parametrize("batch", range(20))
def test_damaged_lines_come_out_as_what_they_are_and_the_others_unchanged(tmp_path, texts, batch):
    kinds = set()
    for seed in range(batch * 150, (batch + 1) * 150):
        rng = random.Random(seed)
        lines, suffix = planted(texts, rng), rng.choice([".jsonl", *COMPRESS])
        path = tmp_path / f"in{suffix}"
        path.write_bytes(packed(joined(lines, rng), suffix, rng))

        assert without_reasons(read(path)) == expected(lines, path), f"seed {seed}"

        kinds |= {line.bad for line in lines if line.bad}
    assert kinds == set(get_args(BadKind)) - {"damaged archive"}


def damaged(data: bytes, other: bytes, rng: random.Random, places: range | list[int]) -> tuple[str, bytes, int]:
    """The damage's name, the data with it, and the first byte that may differ, one of `places` or the end."""
    start = rng.choice(places)
    end = rng.randint(start + 1, min(start + 64, len(data)))
    before, between, behind = data[:start], data[start:end], data[end:]
    flipped = bytes([between[0] ^ 1 << rng.randrange(8)]) + between[1:]
    changes = {
        "truncated": (before, start),
        "bit flipped": (before + flipped + behind, start),
        "overwritten": (before + rng.randbytes(len(between)) + behind, start),
        "zeroed": (before + bytes(len(between)) + behind, start),
        "range lost": (before + behind, start),
        "range twice": (before + between * 2 + behind, end),
        "range put in": (before + rng.randbytes(len(between)) + between + behind, start),
        "beginning lost": (between + behind, 0),
        "spliced": (before + other[rng.randint(0, len(other)) :], start),
        "garbage behind": (data + rng.choice([rng.randbytes(9), bytes(9)]), len(data)),
    }
    name = rng.choice([*changes])
    return name, *changes[name]


def unpacked(data: bytes, suffix: str) -> Iterator[tuple[bytes, bytes]]:
    """The frames of an archive, the last one perhaps cut short, each with what the library itself makes of it."""
    while data:
        frame = zlib.decompressobj(wbits=31) if suffix == ".jsonl.gz" else zstandard.ZstdDecompressor().decompressobj()
        content = frame.decompress(data)
        yield data[: len(data) - len(frame.unused_data)], content
        data = frame.unused_data


@dataclass(frozen=True)
class Archive:
    """A compressed input: its lines, the slices of its content that became frames, and these."""

    suffix: str
    lines: list[Line]
    slices: list[bytes]
    frames: list[bytes]

    @classmethod
    def of(cls, texts: list[str], suffix: str, rng: random.Random) -> Self:
        lines = planted(texts, rng)
        slices = cut(joined(lines, rng), rng)
        return cls(suffix, lines, slices, [COMPRESS[suffix](piece) for piece in slices])

    @property
    def data(self) -> bytes:
        return b"".join(self.frames)

    @property
    def ends(self) -> list[int]:
        return list(accumulate(map(len, self.frames)))

    def lines_before(self, byte: int) -> int:
        """Lines that end in frames which end before this byte."""
        return sum(piece.count(b"\n") for piece, end in zip(self.slices, self.ends, strict=True) if end <= byte)


@pytest.mark.parametrize("held_bytes", [0, 1000, data_tools.archives.HELD_BYTES])
@pytest.mark.parametrize("batch", range(16))
def test_of_a_damaged_archive_comes_what_can_be_trusted_then_one_bad_line(
    tmp_path, monkeypatch, texts, batch, held_bytes
):
    monkeypatch.setattr(data_tools.archives, "HELD_BYTES", held_bytes)
    for suffix in COMPRESS:  # so small that a frame's content, its checksum and the next frame come apart
        form = data_tools.archives.FORMATS[suffix]._replace(slice_bytes=16)
        monkeypatch.setitem(data_tools.archives.FORMATS, suffix, form)
    found = Counter[str]()
    for seed in range(batch * 150, (batch + 1) * 150):
        rng = random.Random(seed)
        suffix = rng.choice([*COMPRESS])
        archive, other = (Archive.of(texts, suffix, rng) for _ in range(2))
        # Not between two frames: a file that ends there, or goes on with another frame, is a sound one.
        places = [place for place in range(1, len(archive.data)) if place not in archive.ends]
        name, data, first = damaged(archive.data, other.data, rng, places)
        path = tmp_path / f"in{suffix}"
        path.write_bytes(data)
        whole = expected(archive.lines, path)

        items = read(path)

        if not any(item.kind == "damaged archive" for item in items if isinstance(item, BadLine)):
            # Bytes that mean nothing for the content, such as the time in gzip's header; or what took a whole frame
            # away: from a place in its header to the same place in the next one's.
            frames = {frame for frame, _ in unpacked(data, suffix)}
            assert without_reasons(items) == whole or frames < {*archive.frames, *other.frames}, f"seed {seed}: {name}"
            continue
        found[name] += 1
        *items, tail = items
        items, sure = without_reasons(items), archive.lines_before(first)
        assert tail.kind == "damaged archive", f"seed {seed}: {name}"
        if name == "truncated":
            content = b"".join(content for _, content in unpacked(data, suffix))
            sure = content.count(b"\n")
            assert (tail.line, tail.raw) == (sure + 1, shown(content.split(b"\n")[-1])), f"seed {seed}"
            assert len(items) == sum(item.line <= sure for item in whole), f"seed {seed}"
        surely = [item for item in whole if item.line <= sure]
        assert items[: len(surely)] == surely, f"seed {seed}: {name}"
        # What made a last frame too short in its middle left it without a checksum: only what came before is sure.
        if name == "truncated" or "truncated" not in tail.reason:
            assert items == whole[: len(items)], f"seed {seed}: {name}"
            assert tail.line > max([sure, *(item.line for item in items)]), f"seed {seed}: {name}"
    assert found.total() > 140 and len(found) == 10


@pytest.mark.parametrize("batch", range(10))
def test_in_a_damaged_plain_file_every_line_is_accounted_for_and_whole_lines_are_unchanged(tmp_path, texts, batch):
    path = tmp_path / "in.jsonl"
    for seed in range(batch * 100, (batch + 1) * 100):
        rng = random.Random(seed)
        lines, others = planted(texts, rng), planted(texts, rng)
        content = joined(lines, rng) or b"\n"
        name, data, _ = damaged(content, joined(others, rng), rng, range(len(content)))
        path.write_bytes(data)
        known = {line.content: line for line in (*lines, *others)}

        items = {item.line: item for item in without_reasons(read(path))}

        raw = dict(enumerate(data.split(b"\n"), start=1))
        # Only a first line may begin with a byte order mark.
        blank = {number for number in raw if not raw[number].removeprefix(b"\xef\xbb\xbf" * (number == 1)).strip()}
        assert items.keys() == raw.keys() - blank, f"seed {seed}: {name}"
        for number, item in items.items():
            if isinstance(item, BadLine):
                assert item.raw == shown(raw[number]), f"seed {seed}: {name}"
            if number > 1 and raw[number] in known and not raw[number].startswith(b"\xef\xbb\xbf"):
                assert item == known[raw[number]].item(path, number), f"seed {seed}: {name}"


@pytest.mark.parametrize("batch", range(3))
def test_a_part_holds_and_counts_what_was_planted_and_its_quarantine_the_rest(
    tmp_path, texts, tokenizer, tokenizer_file, batch
):
    for seed in range(batch * 100, (batch + 1) * 100):
        rng = random.Random(seed)
        suffix = rng.choice([".jsonl", *COMPRESS])
        # A line that is too long would have to have a gigabyte here.
        lines = [line for line in planted(texts, rng) if line.bad != "line too long"]
        path, prefix = tmp_path / f"in{suffix}", tmp_path / f"part{seed}"
        path.write_bytes(packed(joined(lines, rng), suffix, rng))

        part, _ = make_part(PartJob(path, prefix, str(tokenizer_file), tokenizer.sha256, tmp_path), lambda count: None)

        items = expected(lines, path)
        documents = [item for item in items if isinstance(item, Document) and item.text]
        bad = [item for item in items if isinstance(item, BadLine)]
        counts = (part.documents, part.empty_documents, part.bad)
        planted_empty = len(items) - len(documents) - len(bad)
        assert counts == (len(documents), planted_empty, Counter(item.kind for item in bad)), f"seed {seed}"
        set_aside = quarantine_path(tmp_path, prefix.name)
        assert set_aside.exists() == bool(bad), f"seed {seed}"
        assert without_reasons(list(read_quarantine(set_aside)) if bad else []) == bad, f"seed {seed}"
        table = open_documents(PartPaths.of(prefix).documents)
        assert [tuple(row[["hash_high", "hash_low", "text_bytes", "line"]].item()) for row in table] == [
            (*text_hash(item.text), item.line) for item in documents
        ], f"seed {seed}"
        tokens = np.fromfile(PartPaths.of(prefix).bin, np.uint16)
        ids = [id for item in documents for id in (*tokenizer.encode(item.text), tokenizer.eos_id)]
        assert tokens.tolist() == ids, f"seed {seed}"
        assert np.count_nonzero(tokens == tokenizer.eos_id) == len(documents), f"seed {seed}"

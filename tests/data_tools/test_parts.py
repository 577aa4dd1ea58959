import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import data_tools.parts
from data_tools.documents import open_documents
from data_tools.parts import BadInput, Part, PartJob, PartPaths, make_part, remove_leftovers
from data_tools.tokenizer import TokenizerError


@pytest.fixture
def job(tmp_path: Path, corpus: Path, tokenizer, tokenizer_file) -> PartJob:
    source = tmp_path / "in.jsonl"
    source.write_bytes(corpus.read_bytes())
    (tmp_path / "parts").mkdir()
    return PartJob(source, tmp_path / "parts" / "x", str(tokenizer_file), tokenizer.sha256, None)


@pytest.fixture
def make() -> Callable:
    """Makes a part; returns what make_part does, and how many bytes it told of."""

    def make(job: PartJob) -> tuple[Part, bool, int]:
        told = []
        part, found = make_part(job, told.append)
        return part, found, sum(told)

    return make


def test_a_part_is_found_again_without_reading_its_input(job, make, monkeypatch):
    size = job.source.stat().st_size
    part, found, told = make(job)
    assert (found, told, part.source.size, part.documents) == (False, size, size, 12)

    monkeypatch.setattr(data_tools.parts, "sha256_file", lambda *_: 1 / 0)

    assert make(job) == (part, True, size)


def test_an_input_that_was_touched_is_hashed_and_one_that_changed_is_read(job, make):
    part, _, _ = make(job)
    os.utime(job.source)
    assert make(job) == (part, True, part.source.size)
    content = bytearray(job.source.read_bytes())
    content[content.index(b"the")] = ord("T")
    job.source.write_bytes(content)

    changed, found, told = make(job)

    assert (found, told) == (False, part.source.size)
    assert changed.source.sha256 != part.source.sha256


def test_an_input_that_changes_while_it_is_read_is_named_and_gives_no_part(job, make, monkeypatch):
    read = data_tools.parts.read_documents

    def read_and_write(path: Path, on_bytes: Callable):
        yield from read(path, on_bytes)
        with open(path, "a") as stream:
            stream.write(json.dumps({"text": "late"}))

    with monkeypatch.context() as patch:
        patch.setattr(data_tools.parts, "read_documents", read_and_write)
        with pytest.raises(ValueError, match=r"in.jsonl: changed while it was read"):
            make(job)
    assert list(job.prefix.parent.iterdir()) == []

    assert make(job)[0].documents == 13


def test_a_bad_record_is_an_error_and_leaves_nothing(job, make):
    with open(job.source, "a") as stream:
        stream.write('{"text": 7}\n')

    with pytest.raises(BadInput, match=r"in.jsonl:13: `text` is int, not a string"):
        make(job)
    assert list(job.prefix.parent.iterdir()) == []


def test_an_input_without_documents_is_an_empty_part(job, make):
    job.source.write_text('{"text": ""}\n\n')

    part, _, _ = make(job)

    assert (part.documents, part.tokens, part.empty_documents, part.sets) == (0, 0, 1, {})
    paths = PartPaths.of(job.prefix)
    assert (paths.bin.stat().st_size, len(open_documents(paths.documents))) == (0, 0)


def test_what_a_killed_run_left_is_removed(job, make):
    for name in ("x.bin.tmp1", "x.documents.npy.tmp22"):
        (job.prefix.parent / name).write_bytes(b"half")

    remove_leftovers([job], job.prefix.parent)
    make(job)

    assert sorted(path.name for path in job.prefix.parent.iterdir()) == ["x.bin", "x.documents.npy", "x.done.json"]


def test_a_tokenizer_that_changed_is_refused(job, make):
    with pytest.raises(TokenizerError, match=r"the file changed while it was in use"):
        make(PartJob(job.source, job.prefix, job.tokenizer, "0" * 64, None))


@pytest.mark.parametrize("end", ["bin", "documents"])
def test_a_part_that_lost_a_file_or_its_end_is_made_again(job, make, end):
    make(job)
    path = getattr(PartPaths.of(job.prefix), end)
    whole = path.read_bytes()
    for damage in (path.unlink, lambda: path.write_bytes(whole[:-30])):
        damage()
        assert make(job)[1] is False
        assert path.read_bytes() == whole

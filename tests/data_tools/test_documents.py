import hashlib

import numpy as np
import pytest

from data_tools.documents import DOCUMENT, open_documents, text_hash, write_documents


@pytest.mark.parametrize("count", [0, 1, 5, 8, 21])
def test_rows_come_back_with_sets_numbered_by_name(tmp_path, monkeypatch, count):
    monkeypatch.setattr("data_tools.documents.ROWS_HELD", 4)
    names = ["Wikipedia", "Book", "C4"]

    with write_documents(tmp_path / "x.documents.npy") as table:
        for i in range(count):
            table.add("text" * i, i + 1, names[i % 3], 2 * i + 1)

    table = open_documents(tmp_path / "x.documents.npy")
    assert table.dtype == DOCUMENT
    places = [sorted(names[:count]).index(names[i % 3]) for i in range(count)]
    assert table["set"].tolist() == places
    assert table["tokens"].tolist() == [i + 1 for i in range(count)]
    assert table["text_bytes"].tolist() == [4 * i for i in range(count)]
    assert table["line"].tolist() == [2 * i + 1 for i in range(count)]
    assert [path.name for path in tmp_path.iterdir()] == ["x.documents.npy"]


def test_the_hash_is_the_start_of_sha256_however_long_the_text(monkeypatch):
    monkeypatch.setattr("data_tools.documents.CHARACTERS_HELD", 3)
    for text in ("", "é", "abcdéfgh漢"):
        high, low, size = text_hash(text)
        assert f"{high:016x}{low:016x}" == hashlib.sha256(text.encode()).hexdigest()[:32]
        assert size == len(text.encode())


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), write_documents(tmp_path / "x.npy") as table:
        table.add("text", 1, "Book", 1)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_table_is_named(tmp_path):
    path = tmp_path / "x.npy"
    for content, why in [(b"", "not a document table"), (b"no numpy", "not a document table")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"x.npy: {why}"):
            open_documents(path)
    np.save(path, np.zeros(3))
    with pytest.raises(ValueError, match=r"x.npy: not a document table: an array of float64"):
        open_documents(path)


def test_set_names_that_differ_in_a_nul_keep_their_documents(tmp_path):
    names = ["a\0", "a", "a\0\0", ""]
    with write_documents(tmp_path / "x.npy") as table:
        for name in names:
            table.add("text", 1, name, 1)

    assert [sorted(names)[number] for number in open_documents(tmp_path / "x.npy")["set"]] == names


def test_more_sets_than_numbers_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.documents.MOST_SETS", 3)

    with pytest.raises(ValueError, match="line 4: more than 3 set names"), write_documents(tmp_path / "x.npy") as table:
        for number in range(1, 5):
            table.add("text", 1, f"set {number}", number)

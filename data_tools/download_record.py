"""What a download folder says of itself: the commit that it holds (`download.json`), and the files found whole."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import orjson
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from pydantic import TypeAdapter, ValidationError

from data_tools.files import write_durably
from data_tools.shards import first_problem

FORMAT_VERSION = 1
# No part may begin with a dot: a path that a server gives must not lead out of the folder.
LAYOUT = re.compile(r"(\w[\w.-]*)/chunk(0|[1-9]\d*)/\w[\w.-]*\.jsonl\.zst", re.ASCII)


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository: its path there and below the folder, SPLIT/chunkN/NAME, and its content's hash."""

    path: str
    size: int
    algorithm: Literal["sha256", "git-sha1"]
    digest: str

    @classmethod
    def of(cls, entry: RepoFile) -> Self:
        """From a listing: files in LFS have a SHA-256, others git's hash of the blob."""
        if entry.lfs:
            return cls(entry.path, entry.lfs.size, "sha256", entry.lfs.sha256)
        return cls(entry.path, entry.size, "git-sha1", entry.blob_id)

    @property
    def place(self) -> tuple[str, int]:
        """Split and chunk."""
        split, chunk, _ = self.path.split("/")
        return split, int(chunk.removeprefix("chunk"))

    def damage(self, path: Path) -> str | None:
        """What is wrong with the copy at `path`, None for nothing; reads all of it."""
        if (size := path.stat().st_size) != self.size:
            return f"{size:,} bytes, should be {self.size:,}"
        if self.algorithm == "sha256":
            begin = hashlib.sha256()
        else:
            begin = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, lambda: begin).hexdigest()
        return None if found == self.digest else f"{self.algorithm} {found}, should be {self.digest}"


@dataclass(frozen=True)
class Record:
    """What is downloaded into a folder: `download.json`, written before any file.

    With all the files of the commit in it, later runs choose, go on and verify without asking for a listing again,
    and a branch that moves meanwhile changes nothing.
    """

    format_version: int
    repository: str
    revision: str
    commit: str
    files: list[RemoteFile]

    @classmethod
    def of_hub(cls, api: HfApi, repository: str, revision: str, timeout: float) -> Self:
        """Resolve the revision and list its files; raises what the library does, ValueError without data files."""
        commit = api.dataset_info(repository, revision=revision, timeout=timeout).sha
        assert commit is not None
        entries = api.list_repo_tree(repository, repo_type="dataset", revision=commit, recursive=True)
        found = (entry for entry in entries if isinstance(entry, RepoFile) and LAYOUT.fullmatch(entry.path))
        files = sorted(map(RemoteFile.of, found), key=lambda file: (file.place, file.path))
        if not files:
            raise ValueError(f"{repository} at {commit}: no file SPLIT/chunkN/NAME.jsonl.zst in it")
        return cls(FORMAT_VERSION, repository, revision, commit, files)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The folder's record, None where there is none; ValueError for a broken one or another format version."""
        path = folder / "download.json"
        try:
            record = TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise ValueError(f"{path}: {first_problem(error)}; delete it and run again: what is whole stays") from error
        if record.format_version != FORMAT_VERSION:
            raise ValueError(f"{path}: format_version {record.format_version}, this code reads {FORMAT_VERSION}")
        if outside := [file.path for file in record.files if not LAYOUT.fullmatch(file.path)]:
            raise ValueError(f"{path}: {outside[0]!r} is not SPLIT/chunkN/NAME.jsonl.zst")
        return record

    def write(self, folder: Path) -> None:
        """Write whole or not at all."""
        write_durably(folder / "download.json", orjson.dumps(self, option=orjson.OPT_INDENT_2))

    @property
    def chunks(self) -> dict[str, list[int]]:
        """The chunks of every split."""
        chunks: dict[str, set[int]] = {}
        for split, chunk in (file.place for file in self.files):
            chunks.setdefault(split, set()).add(chunk)
        return {split: sorted(numbers) for split, numbers in chunks.items()}

    def select(self, splits: Sequence[str] | None, chunks: Sequence[int] | None) -> list[RemoteFile]:
        """Files of these splits and chunks, None for all; ValueError names what a split lacks and what is there."""
        have = self.chunks
        chosen = have if splits is None else splits
        lacking = [f"no split {split!r}" for split in chosen if split not in have]
        if chunks is not None:
            known = [split for split in chosen if split in have]
            lacking += [f"no {split}/chunk{n}" for split in known for n in chunks if n not in have[split]]
        if lacking:
            there = "; ".join(f"{split}: chunks {', '.join(map(str, numbers))}" for split, numbers in have.items())
            raise ValueError(f"{self.repository} at {self.commit} has {', '.join(lacking)}. It has {there}")
        wanted = {(split, n) for split in chosen for n in (have[split] if chunks is None else chunks)}
        return [file for file in self.files if file.place in wanted]


class Verified:
    """Which files of a folder were found whole: `download.verified`, change time and path a line; the last one counts.

    No copying tool can set back the time of a file's last change, so one that changed since does not count as verified.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "download.verified"
        text = self._path.read_text("utf-8", errors="replace") if self._path.exists() else ""
        # A line that a kill cut off is nobody's path: that file is hashed once more.
        lines = (line.partition(" ") for line in text.splitlines())
        self._changed = {path: changed for changed, _, path in lines}

    def holds(self, file: RemoteFile) -> bool:
        """Whether the file is there, verified and unchanged since."""
        path = self._folder / file.path
        return path.is_file() and self._changed.get(file.path) == str(path.stat().st_ctime_ns)

    def add(self, file: RemoteFile) -> None:
        """The file was just found whole."""
        self._append(f"{(self._folder / file.path).stat().st_ctime_ns} {file.path}\n")

    def remove(self, file: RemoteFile) -> None:
        """The file was found damaged."""
        self._append(f"damaged {file.path}\n")

    def _append(self, line: str) -> None:
        with open(self._path, "ab", buffering=0) as stream:  # one write for a line: threads do not mix
            stream.write(line.encode())

"""Command: tokenize SlimPajama-shaped files into one shard.

Each input file becomes a part of its own under ``PREFIX.parts/``, made by a pool of processes; the
parts are then joined in the order of the files' paths. A part is finished when its marker is there,
so a run that was killed goes on where it stopped, and the shard's bytes depend on the inputs and
the tokenizer alone.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np

from data_tools.files import replace_durably, sha256_file, write_durably
from data_tools.parts import Part, PartJob, TooManyBadLines
from data_tools.pool import make_parts, worker_pool
from data_tools.readers import find_files
from data_tools.shards import (
    FORMAT_VERSION,
    Counts,
    Manifest,
    ShardError,
    ShardPaths,
    TokenizerRecord,
    TokenType,
)
from data_tools.tokenizer import Tokenizer

SHOWN_BAD_LINES = 20


@dataclass(frozen=True)
class Outcome:
    """What a run did: the manifest, and the input files tokenized or taken from an earlier run."""

    manifest: Manifest
    tokenized: list[str]
    reused: list[str]


def tokenize(
    inputs: list[str],
    tokenizer_source: str,
    prefix: str,
    workers: int,
    skip_bad: int = 0,
    overwrite: bool = False,
) -> Outcome:
    """Tokenize the files that match the globs into the shard ``prefix``, or find it made already.

    Args:
        inputs: globs of ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst`` files.
        tokenizer_source: a SentencePiece model file, or ``mistral``.
        workers: processes that tokenize; the result does not depend on it.
        skip_bad: how many lines of the whole run may be unusable; they are left out and listed in
            the manifest.
        overwrite: replace a shard that was made of something else.

    Raises:
        ValueError: a glob matches nothing, an unreadable tokenizer (TokenizerError), another shard
            in the way, no documents (ShardError).
        TooManyBadLines: more than ``skip_bad``; the parts that are finished stay for the next run.
    """
    files, tokenizer = find_files(inputs), Tokenizer.load(tokenizer_source)
    paths = ShardPaths.of(prefix)
    if (manifest := _finished(paths, files, tokenizer, skip_bad, overwrite)) is not None:
        if _parts_folder(paths).exists():  # killed after the manifest was written
            with _work_folder(paths) as folder:
                shutil.rmtree(folder)
        return Outcome(manifest, [], [])
    with _work_folder(paths) as folder:
        merged = ShardPaths.of(folder / "merged")
        jobs = [
            PartJob(path, folder / _part_name(path), tokenizer_source, tokenizer.sha256, skip_bad) for path in files
        ]
        with worker_pool(min(workers, len(jobs))) as (pool, link):
            made = make_parts(jobs, pool, link)
            if not any(part.sets for part, _ in made):
                raise ShardError(f"{len(files)} files, and no document with text in them")
            prefixes = [job.prefix for job in jobs]
            dtype = pool.submit(_merge, prefixes, merged, tokenizer.vocab_size).result()
        manifest = _manifest([part for part, _ in made], merged, tokenizer, dtype)
        if merged.bin.stat().st_size != manifest.tokens * np.dtype(dtype).itemsize:
            raise ShardError(f"{folder}: the parts there are damaged; delete it and run again")
        _publish(merged, paths, tokenizer, manifest)
        shutil.rmtree(folder)
    return Outcome(
        manifest,
        tokenized=[part.source.path for part, found in made if not found],
        reused=[part.source.path for part, found in made if found],
    )


def _publish(merged: ShardPaths, paths: ShardPaths, tokenizer: Tokenizer, manifest: Manifest) -> None:
    # The manifest goes first and comes last: at no time does it stand beside files it doesn't mean.
    paths.manifest.unlink(missing_ok=True)
    replace_durably(merged.bin, paths.bin)
    replace_durably(merged.idx, paths.idx)
    write_durably(paths.tokenizer, tokenizer.serialized)
    manifest.write(paths.manifest)


def _finished(
    paths: ShardPaths, files: list[Path], tokenizer: Tokenizer, skip_bad: int, overwrite: bool
) -> Manifest | None:
    """The shard's manifest if it is what would be made; ShardError if another is in the way."""
    if not paths.manifest.exists():
        if paths.bin.exists() and not overwrite and not _parts_folder(paths).exists():
            raise ShardError(f"{paths.bin} is there without a manifest: not made here; --overwrite replaces it")
        return None
    try:
        manifest = Manifest.read(paths.manifest)
        difference = _difference(manifest, paths, files, tokenizer, skip_bad)
    except ShardError as error:
        difference = str(error)
    if not difference:
        return manifest
    if not overwrite:
        raise ShardError(f"{paths.manifest}: there is a shard that differs: {difference}; --overwrite replaces it")
    return None


def _difference(
    manifest: Manifest, paths: ShardPaths, files: list[Path], tokenizer: Tokenizer, skip_bad: int
) -> str | None:
    if missing := [path for path in (paths.bin, paths.idx, paths.tokenizer) if not path.is_file()]:
        return f"{missing[0]} is missing"
    if manifest.tokenizer.sha256 != tokenizer.sha256:
        return f"made with another tokenizer ({manifest.tokenizer.name}, {manifest.tokenizer.sha256})"
    if len(manifest.bad_lines) > skip_bad:
        return f"{len(manifest.bad_lines)} bad lines were skipped, --skip-bad allows {skip_bad}"
    if len(manifest.sources) != len(files):
        return f"made from {len(manifest.sources)} files, --input matches {len(files)}"
    # By content and not by path: a folder that moved is the same corpus.
    for source, path in zip(manifest.sources, files, strict=True):
        if source.size != path.stat().st_size or source.sha256 != sha256_file(path):
            return f"{path} has other content than {source.path} had"
    return None


def _parts_folder(paths: ShardPaths) -> Path:
    return paths.bin.with_suffix(".parts")


def _part_name(path: Path) -> str:
    # By path, not by position: a file added to the folder must not shift the others' parts.
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


@contextmanager
def _work_folder(paths: ShardPaths) -> Iterator[Path]:
    folder = _parts_folder(paths)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(f"{folder}: another run is writing this shard") from error
        for left_by_killed_run in folder.glob("*.tmp*"):
            left_by_killed_run.unlink()
        yield folder


def _merge(parts: list[Path], paths: ShardPaths, vocab_size: int) -> TokenType:
    # Runs in a worker, which has megatron-core loaded already.
    from data_tools.indexed import merge_shards

    return merge_shards(parts, paths, vocab_size)


def _manifest(parts: list[Part], paths: ShardPaths, tokenizer: Tokenizer, dtype: TokenType) -> Manifest:
    sets: dict[str, Counts] = {}
    for part in parts:
        for name, counts in part.sets.items():
            sets[name] = sets.get(name, Counts()) + counts
    total = reduce(add, sets.values())
    return Manifest(
        format_version=FORMAT_VERSION,
        documents=total.documents,
        tokens=total.tokens,
        text_bytes=total.text_bytes,
        sets=dict(sorted(sets.items())),
        empty_documents=sum(part.empty_documents for part in parts),
        bad_lines=[line for part in parts for line in part.bad_lines],
        dtype=dtype,
        tokenizer=TokenizerRecord(tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_id),
        bin_sha256=sha256_file(paths.bin),
        idx_sha256=sha256_file(paths.idx),
        sources=[part.source for part in parts],
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_tools.tokenize", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="globs of .jsonl, .jsonl.gz, .jsonl.zst files")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece model file, or `mistral`")
    parser.add_argument(
        "--output",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin, .idx, .manifest.json, …",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument(
        "--skip-bad",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N bad lines (default 0)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a shard made of something else")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: must be at least 1")
    if arguments.skip_bad < 0:
        parser.error(f"--skip-bad {arguments.skip_bad}: must not be negative")
    return arguments


def _report(outcome: Outcome, prefix: str, seconds: float) -> str:
    manifest = outcome.manifest
    megabytes = manifest.text_bytes / 1e6
    size = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, {megabytes:,.1f} MB of text"
    if not outcome.tokenized and not outcome.reused:
        return f"{prefix}: already complete ({size}); nothing to do"
    return (
        f"{prefix}: {size}; {len(outcome.tokenized)} files tokenized, {len(outcome.reused)} taken "
        f"from an earlier run; left out: {manifest.empty_documents} empty documents, "
        f"{len(manifest.bad_lines)} bad lines; {seconds:.1f} s"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    arguments = _arguments(argv)
    started = time.perf_counter()
    try:
        outcome = tokenize(
            arguments.input,
            arguments.tokenizer,
            arguments.output,
            arguments.workers,
            arguments.skip_bad,
            arguments.overwrite,
        )
    except TooManyBadLines as error:
        shown = error.lines[:SHOWN_BAD_LINES]
        print(*shown, sep="\n", file=sys.stderr)
        print(
            f"error: {len(error.lines)} bad lines so far, --skip-bad allows {arguments.skip_bad}; "
            "finished files are kept, nothing was written to the output",
            file=sys.stderr,
        )
        return 1
    except BrokenProcessPool:
        print(
            "error: a worker was killed (out of memory?); run again to go on, with fewer --workers",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    print(_report(outcome, arguments.output, time.perf_counter() - started))
    return 0


if __name__ == "__main__":
    sys.exit(main())

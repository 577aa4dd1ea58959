"""Command: tokenize SlimPajama-shaped files into one shard, or into parts for `data_tools.subset`.

Each input file becomes a part of its own under `PREFIX.parts/`, made by a pool of processes; the parts are then joined
in the order of the files' paths. A part is finished when its marker is there, so a run that was killed goes on where
it stopped, and the shard's bytes depend on the inputs and the tokenizer alone. `launch/tokenize.sh` spreads the parts
over a cluster.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Self, TypeVar

from data_tools.command import exit_status
from data_tools.corpus import Inputs, corpus_of, finished_parts, part_name, parts_folder
from data_tools.estimate import estimate
from data_tools.files import replace_durably, sha256_file, unchanged_since, write_durably
from data_tools.index import token_dtype
from data_tools.jobs import run_jobs
from data_tools.lock import lock
from data_tools.merge import merge_parts
from data_tools.parts import Part, PartJob, PartPaths, make_part, remove_leftovers
from data_tools.pool import worker_pool
from data_tools.progress import BytesProgress
from data_tools.quarantine import SUFFIX
from data_tools.readers import find_files
from data_tools.shards import FORMAT_VERSION, Counts, Manifest, ShardError, ShardPaths, token_type
from data_tools.tokenizer import Tokenizer


@dataclass(frozen=True)
class Task:
    """Every `of`-th input file, from number `index` on: one task of a job array."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `I/N`; ArgumentTypeError says how it is written."""
        index, _, of = text.partition("/")
        if not (index.isdecimal() and of.isdecimal() and int(index) < int(of)):
            raise argparse.ArgumentTypeError(f"{text!r}: write I/N with I from 0 to N − 1, like 0/64")
        return cls(int(index), int(of))


@dataclass(frozen=True)
class Plan:
    """What to tokenize, with what, and where to."""

    files: list[Path]
    tokenizer: Tokenizer
    tokenizer_source: str
    prefix: str
    bad_dir: Path | None

    @classmethod
    def of(cls, inputs: list[str], tokenizer_source: str, prefix: str | Path, bad_dir: Path | None = None) -> Self:
        """Find the files that match the globs, and load the tokenizer; ValueError for either."""
        tokenizer, files = Tokenizer.load(tokenizer_source), find_files(inputs)
        if aside := [path for path in files if path.name.endswith(SUFFIX)]:
            raise ValueError(f"--input matches {aside[0]}, records that --bad-dir has set aside; narrow the glob")
        return cls(files, tokenizer, tokenizer_source, str(prefix), bad_dir)

    @property
    def folder(self) -> Path:
        """Where the parts go."""
        return parts_folder(self.prefix)

    def files_of(self, task: Task) -> list[Path]:
        """The input files of a task."""
        return self.files[task.index :: task.of]

    def jobs(self, task: Task) -> list[PartJob]:
        """One for each input file of the task."""
        source, sha256 = self.tokenizer_source, self.tokenizer.sha256
        return [
            PartJob(path, self.folder / part_name(path), source, sha256, self.bad_dir) for path in self.files_of(task)
        ]


@dataclass(frozen=True)
class Outcome:
    """What a run did: the counts of its parts, the input files tokenized or found done, and the shard if it merged."""

    total: Counts
    empty_documents: int
    bad: dict[str, int]
    tokenized: list[str]
    reused: list[str]
    manifest: Manifest | None = None


WHOLE = Task(0, 1)
Count = TypeVar("Count", int, Counts)


def tokenize(
    inputs: list[str],
    tokenizer_source: str,
    prefix: str | Path,
    workers: int,
    bad_dir: Path | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Tokenize the files that match the globs into the shard `prefix`, or find it made already.

    Args:
        inputs: globs of `.jsonl`, `.jsonl.gz`, `.jsonl.zst` files.
        tokenizer_source: a SentencePiece model file, or `mistral`.
        workers: processes that tokenize; the result does not depend on it.
        bad_dir: where records that can't be used go, counted in the manifest; None: the first one is an error.
        overwrite: replace a shard that was made of something else.

    Raises:
        ValueError: a glob matches nothing, an unreadable tokenizer (TokenizerError), an unusable record (BadInput),
            an input that changes while it is read, another shard in the way, no documents (ShardError).
        OSError: a disk is full, say; what is finished stays for the next run.
    """
    manifest = make_shard(Plan.of(inputs, tokenizer_source, prefix, bad_dir), workers, overwrite).manifest
    assert manifest is not None
    return manifest


def make_shard(plan: Plan, workers: int, overwrite: bool = False) -> Outcome:
    """As :func:`tokenize`; says also what was done."""
    paths = ShardPaths.of(plan.prefix)
    if (manifest := _finished(paths, plan, overwrite)) is not None:
        if plan.folder.exists():  # killed after the manifest was written
            with lock(plan.folder / "lock"):
                shutil.rmtree(plan.folder)
        return _found(manifest)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with lock(plan.folder / "lock"):
        inputs = Inputs.of(plan.files, plan.tokenizer)
        if not overwrite:
            _keep_others(plan.folder, inputs)
        inputs.write(plan.folder)
        outcome = _make_parts(plan, WHOLE, workers)
        if not outcome.total.documents:
            raise ShardError(f"{len(plan.files)} files, and no document with text in them")
        manifest = _merge(plan, inputs, paths)
        shutil.rmtree(plan.folder)
    return replace(outcome, manifest=manifest)


def make_task(plan: Plan, task: Task, workers: int) -> Outcome:
    """Make a task's parts and no more; other tasks may make theirs at the same time.

    Raises what :func:`tokenize` does, and ShardError where the parts there were begun for other files.
    """
    if (manifest := _finished(ShardPaths.of(plan.prefix), plan, overwrite=False)) is not None:
        return _found(manifest)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with lock(plan.folder / "lock", shared=True), lock(plan.folder / f"lock.{task.index}-of-{task.of}"):
        inputs, begun = Inputs.of(plan.files, plan.tokenizer), Inputs.read(plan.folder)
        if begun is None:
            inputs.write(plan.folder)
        elif begun != inputs:
            raise ShardError(
                f"{plan.folder}: begun for other files or another tokenizer ({len(begun.files)} files, "
                f"{begun.tokenizer.name}; now {len(inputs.files)}, {inputs.tokenizer.name}); once the inputs are "
                f"final, delete {plan.folder / 'inputs.json'} and start all tasks again"
            )
        return _make_parts(plan, task, workers)


def _found(manifest: Manifest) -> Outcome:
    total = Counts(manifest.documents, manifest.tokens, manifest.text_bytes)
    return Outcome(total, manifest.empty_documents, manifest.bad, [], [], manifest)


def _keep_others(folder: Path, inputs: Inputs) -> None:
    """ShardError where there are finished parts of files that are no inputs now: the merge would delete them."""
    begun, names = Inputs.read(folder), {file.name for file in inputs.files}
    others = [file for file in begun.files if file.name not in names] if begun else []
    if finished := [file.path for file in others if PartPaths.of(folder / file.name).marker.exists()]:
        raise ShardError(
            f"{folder}: has finished parts of {len(finished)} files that --input does not match, like {finished[0]}; "
            "name them too, or another --output, or delete them with --overwrite"
        )


def _make_parts(plan: Plan, task: Task, workers: int) -> Outcome:
    model = plan.folder / "tokenizer.model"
    if not model.is_file() or model.read_bytes() != plan.tokenizer.serialized:
        write_durably(model, plan.tokenizer.serialized)
    jobs = plan.jobs(task)
    if not jobs:  # fewer files than tasks
        return Outcome(Counts(), 0, {}, [], [])
    remove_leftovers(jobs, plan.folder)
    sizes = {job.prefix: job.source.stat().st_size for job in jobs}
    # The largest first, so that none is left over at the end.
    jobs.sort(key=lambda job: sizes[job.prefix], reverse=True)
    with worker_pool(min(workers, len(jobs))) as pool:
        made = run_jobs("tokenizing (input as stored)", sum(sizes.values()), make_part, jobs, pool)
    parts = [part for part, _ in made]
    return Outcome(
        reduce(add, (counts for part in parts for counts in part.sets.values()), Counts()),
        sum(part.empty_documents for part in parts),
        _sum_by_name(part.bad for part in parts),
        tokenized=[part.source.path for part, found in made if not found],
        reused=[part.source.path for part, found in made if found],
    )


def _merge(plan: Plan, inputs: Inputs, paths: ShardPaths) -> Manifest:
    merged, parts = ShardPaths.of(plan.folder / "merged"), finished_parts(inputs, plan.folder)
    corpus = corpus_of(parts, inputs, plan.folder)
    for left_by_killed_run in plan.folder.glob("merged.*"):
        left_by_killed_run.unlink()
    size = sum(piece.tokens for piece in corpus.pieces) * corpus.dtype.itemsize
    with BytesProgress("merging", size) as progress:
        hashes = merge_parts(corpus, merged, progress.advance)
    manifest = _manifest(parts, plan.tokenizer, hashes)
    # The manifest goes first and comes last: at no time does it stand beside files it doesn't mean.
    paths.manifest.unlink(missing_ok=True)
    for temporary, final in ((merged.bin, paths.bin), (merged.idx, paths.idx), (merged.documents, paths.documents)):
        replace_durably(temporary, final)
    write_durably(paths.tokenizer, plan.tokenizer.serialized)
    manifest.write(paths.manifest)
    return manifest


def _manifest(parts: list[Part], tokenizer: Tokenizer, hashes: dict[str, str]) -> Manifest:
    sets = _sum_by_name(part.sets for part in parts)
    total = reduce(add, sets.values())
    return Manifest(
        format_version=FORMAT_VERSION,
        documents=total.documents,
        tokens=total.tokens,
        text_bytes=total.text_bytes,
        sets=sets,
        empty_documents=sum(part.empty_documents for part in parts),
        bad=_sum_by_name(part.bad for part in parts),
        dtype=token_type(token_dtype(tokenizer.vocab_size)),
        tokenizer=tokenizer.record,
        sources=[part.source for part in parts],
        **hashes,
    )


def _sum_by_name(counts: Iterable[dict[str, Count]]) -> dict[str, Count]:
    total: dict[str, Count] = {}
    for one in counts:
        for name, number in one.items():
            total[name] = total[name] + number if name in total else number
    return dict(sorted(total.items()))


def _finished(paths: ShardPaths, plan: Plan, overwrite: bool) -> Manifest | None:
    """The shard's manifest if it is what would be made; ShardError if another is in the way."""
    if not paths.manifest.exists():
        if paths.bin.exists() and not overwrite and not plan.folder.exists():
            raise ShardError(f"{paths.bin} is there without a manifest: not made here; --overwrite replaces it")
        return None
    try:
        manifest = Manifest.read(paths.manifest)
        difference = _difference(manifest, paths, plan)
    except ShardError as error:
        difference = str(error)
    if not difference:
        return manifest
    if not overwrite:
        raise ShardError(
            f"{paths.manifest}: there is a shard that differs: {difference}; --overwrite replaces it, or name "
            "another --output"
        )
    return None


def _difference(manifest: Manifest, paths: ShardPaths, plan: Plan) -> str | None:
    if missing := [path for path in (paths.bin, paths.idx, paths.documents, paths.tokenizer) if not path.is_file()]:
        return f"{missing[0]} is missing"
    if manifest.tokenizer.sha256 != plan.tokenizer.sha256:
        return f"made with another tokenizer ({manifest.tokenizer.name}, {manifest.tokenizer.sha256})"
    if manifest.bad and plan.bad_dir is None:
        return f"{_bad_records(manifest.bad)} were left out, which only --bad-dir allows"
    if len(manifest.sources) != len(plan.files):
        return f"made from {len(manifest.sources)} files, --input matches {len(plan.files)}"
    # By content and not by path: a folder that moved is the same corpus.
    for source, path in zip(manifest.sources, plan.files, strict=True):
        same = source.path == str(path) and unchanged_since(path, paths.manifest)
        if source.size != path.stat().st_size or not (same or source.sha256 == sha256_file(path)):
            return f"{path} has other content than {source.path} had"
    return None


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_tools.tokenize", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="globs of .jsonl, .jsonl.gz, .jsonl.zst files")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece model file, or `mistral`")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .manifest.json, …")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument(
        "--bad-dir", type=Path, metavar="DIR", help="set unusable records aside in DIR (default: the first is an error)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what the run would cost, and end")
    parser.add_argument("--parts-only", action="store_true", help="leave the parts unmerged, for data_tools.subset")
    parser.add_argument("--task", type=Task.parse, metavar="I/N", help="only the parts of files I, I + N, …")
    parser.add_argument("--overwrite", action="store_true", help="replace a shard made of something else")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: must be at least 1")
    if arguments.overwrite and (arguments.task or arguments.parts_only):
        parser.error("--overwrite is for a finished shard; --task and --parts-only make none")
    return arguments


def _bad_records(bad: dict[str, int]) -> str:
    kinds = ", ".join(f"{number} {kind}" for kind, number in bad.items())
    return f"{sum(bad.values())} unusable records" + (f" ({kinds})" if kinds else "")


def _report(outcome: Outcome, plan: Plan, seconds: float) -> str:
    total = outcome.total
    size = f"{total.documents:,} documents, {total.tokens:,} tokens, {total.text_bytes / 1e6:,.1f} MB of text"
    if outcome.manifest and not (outcome.tokenized or outcome.reused):
        return f"{plan.prefix}: already complete ({size}); nothing to do"
    where = plan.prefix if outcome.manifest else plan.folder
    aside = f" in {plan.bad_dir}" if outcome.bad else ""
    lines = [
        f"{where}: {size}; {len(outcome.tokenized)} files tokenized, {len(outcome.reused)} taken from an earlier run; "
        f"left out: {outcome.empty_documents} empty documents, {_bad_records(outcome.bad)}{aside}; {seconds:.1f} s"
    ]
    if not outcome.reused:
        lines[0] += f", {total.text_bytes / seconds / 1e6:.1f} MB/s, {total.tokens / seconds:,.0f} tokens/s"
    if not outcome.manifest:
        lines.append(f"next, when all parts are there: python -m data_tools.subset --input {plan.prefix} …")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the process's exit status."""
    arguments = _arguments(argv)
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    plan = Plan.of(arguments.input, arguments.tokenizer, arguments.output, arguments.bad_dir)
    task = arguments.task or WHOLE
    if files := plan.files_of(task):
        print(*estimate(files, plan.tokenizer, Path(plan.prefix), arguments.workers).lines(), sep="\n", flush=True)
    if arguments.dry_run:
        return
    if arguments.task or arguments.parts_only:
        outcome = make_task(plan, task, arguments.workers)
    else:
        outcome = make_shard(plan, arguments.workers, arguments.overwrite)
    print(_report(outcome, plan, time.perf_counter() - started))


if __name__ == "__main__":
    sys.exit(main())

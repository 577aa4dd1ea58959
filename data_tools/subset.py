"""Command: choose documents of tokenized corpora, and write them in shuffled order as a dataset to train on.

The documents are chosen by hashes of their texts: whatever the files are called, however the corpora are split, and on
any number of workers, equal texts and arguments give equal bytes. Killed and started again, it goes on where it was.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import orjson
from pydantic import TypeAdapter, ValidationError

from data_tools.command import exit_status
from data_tools.dataset import (
    DATASET_VERSION,
    MANIFEST,
    TOKENIZER,
    DatasetManifest,
    Dropped,
    Rule,
    ShardRecord,
    SourceRecord,
    open_dataset,
)
from data_tools.files import sync, write_durably
from data_tools.jobs import Workers
from data_tools.lock import lock
from data_tools.pool import worker_pool
from data_tools.selection import Request, Selection, SourceChoice, select
from data_tools.shards import ShardError, token_type
from data_tools.shuffle import Assignment, Bounds, Stretch, Target, shuffle
from data_tools.spans import Span
from data_tools.subset_plan import DEFAULT_SIZES, Plan, PlanRecord, Sizes
from data_tools.subset_report import NAME as REPORT
from data_tools.subset_report import Report

PLAN = "plan.json"
LOCK = "lock"
SELECTION = "selection.json"
NAME_LENGTH = 64
SHOWN_EXAMPLES = 3


@dataclass(frozen=True)
class Outcome:
    """The finished dataset's report; `made` is False where an earlier run had finished it."""

    report: Report
    made: bool


def make_subset(plan: Plan, workers: int, overwrite: bool = False, sizes: Sizes = DEFAULT_SIZES) -> Outcome:
    """Write the dataset folder that the plan describes, or find it written; neither depends on workers and sizes.

    Args:
        overwrite: replace another dataset, and another run's unfinished work.

    Raises:
        ShardError: something else is in the way, the inputs can't give what is asked for, or they change meanwhile.
        OSError: a disk is full, say; what is finished stays for the next run.
    """
    report = _finished(plan, overwrite)
    if report is not None:
        if plan.work.exists():  # killed after the folder got its name
            with lock(plan.work / LOCK):
                shutil.rmtree(plan.work)
        return Outcome(report, made=False)
    if plan.output.exists():
        _make_way(plan.output)
    plan.work.mkdir(parents=True, exist_ok=True)
    with lock(plan.work / LOCK):
        _claim(plan, sizes, overwrite)
        with worker_pool(workers) as pool:
            try:
                selection = _select(plan, sizes, plan.work, pool)
            except ShardError:
                shutil.rmtree(plan.work)  # gigabytes, and of no use to a run with other arguments
                raise
            records = _shuffle(plan, selection, sizes, pool)
        report = Report.of(plan.record, selection, plan.all_groups(sizes.group_documents))
        _publish(plan, selection, records, report)
    return Outcome(report, made=True)


def preview(plan: Plan, workers: int, sizes: Sizes = DEFAULT_SIZES) -> Report:
    """What :func:`make_subset` would choose; writes to a temporary folder beside the output, and removes it."""
    parent = plan.output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{plan.output.name}.") as folder:
        with worker_pool(workers) as pool:
            selection = _select(plan, sizes, Path(folder), pool)
        return Report.of(plan.record, selection, plan.all_groups(sizes.group_documents))


def _finished(plan: Plan, overwrite: bool) -> Report | None:
    """The report of a finished dataset, if it is what would be made; ShardError if another is in the way."""
    if not plan.output.exists() or (plan.output.is_dir() and not any(plan.output.iterdir())):
        return None
    if not (plan.output / MANIFEST).is_file():
        raise ShardError(f"--output {plan.output}: is there and is no dataset (no {MANIFEST}); name another folder")
    try:
        report = Report.read(plan.output)
        difference = plan.record.difference(report.plan)
        if not difference:
            open_dataset(plan.output)
            return report
    except ShardError as error:
        difference = str(error)
    if not overwrite:
        raise ShardError(f"{plan.output}: there is a dataset that differs: {difference}; --overwrite replaces it")
    return None


def _make_way(output: Path) -> None:
    """Remove an empty folder, and see that another can be renamed, before any work is done."""
    if os.path.ismount(output):
        raise ShardError(f"--output {output}: is a mount point, which can't be renamed; name a folder in it")
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()


@dataclass(frozen=True)
class _Claim:
    """Whose the work folder is."""

    plan: PlanRecord
    sizes: Sizes


def _claim(plan: Plan, sizes: Sizes, overwrite: bool) -> None:
    """Take the work folder, with what an interrupted run of the same plan left; ShardError where it is another's."""
    path = plan.work / PLAN
    if path.exists():
        try:
            there = TypeAdapter(_Claim).validate_json(path.read_bytes())
            difference = plan.record.difference(there.plan) or (there.sizes != sizes and f"sizes {there.sizes} there")
        except ValidationError:
            difference = "it is of another version"
        if difference and not overwrite and (plan.work / SELECTION).exists():
            raise ShardError(f"{plan.work}: left by an unfinished run: {difference}; --overwrite starts over")
        if difference:
            path.unlink()
    if not path.exists():
        for left in plan.work.iterdir():
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_durably(path, orjson.dumps(_Claim(plan.record, sizes)))
    for left_by_killed_run in plan.work.rglob("*.tmp*"):
        left_by_killed_run.unlink()


def _select(plan: Plan, sizes: Sizes, folder: Path, pool: Workers) -> Selection:
    selection = Selection.read(folder / SELECTION)
    if selection is None:
        groups = plan.all_groups(sizes.group_documents)
        selection = select(groups, plan.sources, plan.record.request, sizes.bucket_documents, folder, pool)
        selection.write(folder / SELECTION)
    return selection


def _shuffle(plan: Plan, selection: Selection, sizes: Sizes, pool: Workers) -> list[ShardRecord]:
    folder = plan.work / "dataset"
    folder.mkdir(exist_ok=True)
    stretches = _stretches(plan.groups(sizes.group_documents), selection.span_tokens)
    assignment = Assignment(
        plan.record.request.seed,
        _bounds(selection.sources),
        [plan.work / name for name in selection.dropped],
        [target for source in selection.sources for target in _targets(source)],
    )
    return shuffle(stretches, assignment, sizes.run_tokens, plan.dtype, plan.work, folder, pool)


def _stretches(groups: Sequence[list[Span]], span_tokens: Sequence[list[int]]) -> list[list[Stretch]]:
    """Where the spans' tokens are in their pieces; the groups to exclude, at the end of `span_tokens`, have none."""
    found: list[list[Stretch]] = []
    end = 0
    for spans, counts in zip(groups, span_tokens, strict=False):
        found.append([])
        for span, tokens in zip(spans, counts, strict=True):
            start = end if span.first else 0
            end = start + tokens
            found[-1].append(Stretch(span, start, tokens))
            if span.first + span.count == span.piece.document_count and end != span.piece.tokens:
                raise ShardError(
                    f"{span.piece.documents}: {end} tokens, but {span.piece.bin} has {span.piece.tokens}; "
                    "run data_tools.tokenize again"
                )
    return found


def _bounds(sources: Sequence[SourceChoice]) -> list[Bounds | None]:
    """By source number; nothing is taken of 0, what is excluded."""
    first_shards = accumulate((len(source.shards) for source in sources), initial=0)
    bounds = [
        Bounds(first, [bytes.fromhex(shard.first) for shard in source.shards], bytes.fromhex(source.last))
        if source.shards
        else None
        for first, source in zip(first_shards, sources, strict=False)
    ]
    return [None, *bounds]


def _targets(source: SourceChoice) -> list[Target]:
    base, count = file_name(source.name), len(source.shards)
    return [
        Target(f"{base}-{number:05d}-of-{count:05d}", shard.documents, shard.tokens)
        for number, shard in enumerate(source.shards)
    ]


def file_name(source: str) -> str:
    """A name for a source's files: its own where that is safe, else a safe one that no other source has."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", source)[:NAME_LENGTH].lstrip(".")
    return safe if safe == source and safe else f"{safe}-{sha256(source.encode()).hexdigest()[:8]}"


def _publish(plan: Plan, selection: Selection, records: Sequence[ShardRecord], report: Report) -> None:
    """Complete the folder, and give it its name: it appears whole."""
    new, old = plan.work / "dataset", plan.work / "old"
    write_durably(new / TOKENIZER, plan.tokenizer_bytes)
    report.write(new)
    _manifest(plan, selection, records).write(new / MANIFEST)
    if plan.output.exists():
        plan.output.rename(old)
    new.rename(plan.output)
    sync(plan.output.absolute().parent)
    shutil.rmtree(plan.work)


def _manifest(plan: Plan, selection: Selection, records: Sequence[ShardRecord]) -> DatasetManifest:
    request, taken = plan.record.request, selection.taken
    shares = {source.name: source.share for source in selection.sources}
    shards = iter(records)
    sources = [
        SourceRecord(
            name=source.name,
            digest=source.digest,
            documents=source.taken.documents,
            tokens=source.taken.tokens,
            text_bytes=source.taken.text_bytes,
            duplicates=Dropped(source.duplicates.documents, source.duplicates.tokens),
            overlap=Dropped(source.overlap.documents, source.overlap.tokens),
            shards=[next(shards) for _ in source.shards],
        )
        for source in selection.sources
        if source.shards
    ]
    return DatasetManifest(
        format_version=DATASET_VERSION,
        digest=selection.digest,
        rule=Rule(request.tokens, request.seed, shares, request.shard_tokens, selection.excluded),
        tokenizer=plan.tokenizer,
        dtype=token_type(plan.dtype),
        documents=taken.documents,
        tokens=taken.tokens,
        sources=sources,
    )


def _number(text: str) -> int:
    """A whole number, also written as 100e9."""
    try:
        value = Decimal(text)
        whole = value.is_finite() and 1 <= value < 1 << 63 and value == value.to_integral_value()
    except InvalidOperation:
        whole = False
    if not whole:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number from 1 on, like 100e9")
    return int(value)


def _tokens(text: str) -> int | None:
    return None if text == "all" else _number(text)


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 1 << 64):
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number from 0 to 2^64 − 1")
    return int(text)


def _proportion(text: str) -> tuple[str, float]:
    name, equals, share = text.rpartition("=")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not equals or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write SOURCE=SHARE with a share from 0 to 1, like RedPajamaBook=0.05"
        )
    return name, value


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_tools.subset", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="what data_tools.tokenize made")
    parser.add_argument("--tokens", type=_tokens, required=True, help="how many to take, like 100e9, or `all`")
    parser.add_argument("--seed", type=_seed, required=True, help="for the choice and the order of documents")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the dataset folder to write")
    parser.add_argument(
        "--proportions",
        nargs="+",
        type=_proportion,
        default=[],
        metavar="SOURCE=SHARE",
        help="the sources' shares of the tokens, which add up to 1 (default: as they are)",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="leave out documents that are in these, as validation",
    )
    parser.add_argument("--shard-tokens", type=_number, default=250_000_000, help="size of a shard (default 2.5e8)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be chosen, and the disk it takes")
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset, or unfinished work for one")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: must be at least 1")
    if len(dict(arguments.proportions)) < len(arguments.proportions):
        parser.error("--proportions: a source is given twice")
    return arguments


def _print_report(report: Report) -> None:
    print(*report.table(), sep="\n")
    for what, examples in (("duplicate", report.duplicates), ("excluded", report.overlap)):
        for example in examples[:SHOWN_EXAMPLES]:
            print(f"{what}: {example.dropped} equals {example.equals}")
    print(f"digest {report.digest}" + (f", without the documents of {report.excluded}" if report.excluded else ""))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the process's exit status."""
    arguments = _arguments(argv)
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    request = Request(arguments.tokens, arguments.seed, dict(arguments.proportions), arguments.shard_tokens)
    started = time.perf_counter()
    plan = Plan.of(arguments.input, arguments.exclude, request, arguments.output)
    if arguments.dry_run:
        report = preview(plan, arguments.workers)
        _print_report(report)
        print(_disk(report, plan))
        return
    outcome = make_subset(plan, arguments.workers, arguments.overwrite)
    _print_report(outcome.report)
    if outcome.made:
        print(f"{plan.output}: written in {time.perf_counter() - started:.1f} s; see {plan.output / REPORT}")
    else:
        print(f"{plan.output}: already complete; nothing to do")


def _disk(report: Report, plan: Plan) -> str:
    needed = report.disk_bytes(plan.dtype.itemsize)
    free = shutil.disk_usage(plan.output.absolute().parent).free
    return f"{plan.output}: would need {needed / 1e9:,.2f} GB of disk while it is made; {free / 1e9:,.2f} GB are free"


if __name__ == "__main__":
    sys.exit(main())

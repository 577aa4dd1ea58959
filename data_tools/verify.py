"""Re-hash everything that a manifest speaks of, and check every token."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_tools.contents import Kind, ShardView, find_kind, open_contents
from data_tools.dataset import MANIFEST, TOKENIZER, DatasetManifest, ShardRecord
from data_tools.index import misplaced_sequence
from data_tools.progress import BytesProgress
from data_tools.shards import Shard, ShardFiles, ShardPaths, check_sizes, hash_problem, token_problems, verify_shard

CHUNK_TOKENS = 1 << 24
CHUNK_SEQUENCES = 1 << 20
OnBytes = Callable[[int], None]


def verify(path: str, tokenizer: str | None = None) -> list[str]:
    """Everything that is wrong with what the path names, nothing for sound data; shows how far it is.

    Args:
        tokenizer: as for `open_contents`.

    Raises:
        ShardError: there is no readable manifest, or index of Megatron's, to compare with.
    """
    kind = find_kind(path)
    files = _files(path, kind)
    with BytesProgress("verifying", sum(file.stat().st_size for file in files if file.is_file())) as progress:
        if kind is Kind.SHARD:
            return verify_shard(path, progress.advance)
        if kind is Kind.DATASET:
            return verify_dataset(Path(path), progress.advance)
        return _verify_megatron(path, tokenizer, progress.advance)


def _files(path: str, kind: Kind) -> list[Path]:
    """What will be read from end to end."""
    paths = ShardPaths.of(path)
    if kind is Kind.MEGATRON:
        return [paths.bin]
    if kind is Kind.SHARD:
        return [paths.bin, paths.idx, paths.documents, paths.tokenizer]
    manifest = DatasetManifest.read(Path(path, MANIFEST))
    shards = [ShardPaths.of(Path(path, shard.name)) for source in manifest.sources for shard in source.shards]
    return [*(file for shard in shards for file in (shard.bin, shard.idx)), Path(path, TOKENIZER)]


def verify_dataset(folder: Path, on_bytes: OnBytes = lambda count: None) -> list[str]:
    """Read a whole dataset folder and compare it with its manifest; returns what differs.

    Checked: the hashes of all files, the counts and that they add up, that every id is a piece of the vocabulary, and
    that EOS stands at the end of every document and nowhere else.

    Args:
        on_bytes: hears how many more bytes have been hashed.

    Raises:
        ShardError: there is no readable manifest.
    """
    manifest = DatasetManifest.read(folder / MANIFEST)
    problems = _sum_problems(folder, manifest)
    if problem := hash_problem(folder / TOKENIZER, manifest.tokenizer.sha256, on_bytes):
        problems.append(problem)
    for source in manifest.sources:
        for shard in source.shards:
            problems += _shard_problems(folder, shard, manifest, on_bytes)
    return problems


def _sum_problems(folder: Path, manifest: DatasetManifest) -> list[str]:
    problems = []
    for key in ("documents", "tokens"):
        parts = [(source.name, getattr(source, key), source.shards) for source in manifest.sources]
        sums = [(f"source {name}", said, sum(getattr(shard, key) for shard in shards)) for name, said, shards in parts]
        sums.append(("all", getattr(manifest, key), sum(said for _, said, _ in parts)))
        problems += [
            f"{folder / MANIFEST}: {what}: {said} {key}, its parts have {found}"
            for what, said, found in sums
            if said != found
        ]
    return problems


def _shard_problems(folder: Path, record: ShardRecord, manifest: DatasetManifest, on_bytes: OnBytes) -> list[str]:
    paths = ShardPaths.of(folder / record.name)
    hashes = {paths.bin: record.bin_sha256, paths.idx: record.idx_sha256}
    problems = [problem for path, sha256 in hashes.items() if (problem := hash_problem(path, sha256, on_bytes))]
    try:
        files = ShardFiles(paths.bin, paths.idx, record.documents, record.tokens)
        check_sizes(files, np.dtype(manifest.dtype))
        shard = Shard(paths)
    except ValueError as error:
        return [*problems, str(error)]
    found = (len(shard), int(shard.sequence_lengths.sum(dtype=np.int64)), shard.dtype.name)
    if found != (said := (record.documents, record.tokens, manifest.dtype)):
        described = ["{} documents of {} tokens of {}".format(*each) for each in (found, said)]
        return [*problems, f"{paths.idx}: an index of {described[0]}; the manifest says {described[1]}"]
    return problems + [f"{paths.bin}: {problem}" for problem in token_problems(shard, manifest.tokenizer)]


def _verify_megatron(path: str, tokenizer: str | None, on_bytes: OnBytes) -> list[str]:
    """What can be wrong with a shard that no manifest describes: its index, and ids outside a vocabulary."""
    contents = open_contents(path, tokenizer)
    shard = contents.shards[0]
    problems = _index_problems(shard)
    vocab_size = contents.tokenizer.vocab_size if contents.tokenizer else None
    limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    tokens: np.ndarray = np.memmap(shard.bin, shard.index.dtype, "r") if shard.tokens else np.empty(0, np.int64)
    outside = 0
    for start in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[start : start + CHUNK_TOKENS]
        outside += int(((chunk < 0) | (chunk >= limit)).sum())
        on_bytes(chunk.nbytes)
    if outside:
        of = "negative" if vocab_size is None else f"outside the vocabulary of {vocab_size}"
        problems.append(f"{shard.bin}: {outside} token ids are {of}")
    return problems


def _index_problems(shard: ShardView) -> list[str]:
    """Sequences that don't lie end to end, or documents that are not in the order of their sequences."""
    index, problems = shard.index, []
    if (wrong := misplaced_sequence(index)) is not None:
        problems.append(f"{shard.bin.with_suffix('.idx')}: sequence {wrong} is not where the last ends")
    for start in range(0, len(shard), CHUNK_SEQUENCES):
        backwards = np.flatnonzero(np.diff(index.document_indices[start : start + CHUNK_SEQUENCES + 1]) < 0)
        if len(backwards):
            problems.append(f"{shard.bin.with_suffix('.idx')}: document {start + backwards[0]} ends before it begins")
            break
    return problems

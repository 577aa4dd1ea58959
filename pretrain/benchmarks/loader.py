"""Command: tokens a second that one thread gets through the training loader, and by reading the file from end to end.

    python -m pretrain.benchmarks.loader PREFIX --tokens 200e6

A dataset of several hundred MB is made of the shard's tokens over and over. Each way of reading is timed from the
system's cache, and again after the system was told to forget the files: cold, so far as nothing below the system
(a hypervisor, the disk itself) keeps them.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data_tools.files import sha256_file, sync
from data_tools.index import read_index, write_index
from data_tools.shards import Manifest, ShardError, ShardPaths
from kernels.benchmarks.record import hardware_slug, provenance, write_json
from pretrain.benchmarks import RESULTS
from pretrain.config import Config, ConfigError
from pretrain.data import TrainingData
from pretrain.parallel.mesh import Mesh, init_mesh

CPU = torch.device("cpu")
BUFFER = 1 << 20
STEP = 256  # windows of a step, of one process
TARGET = 5e6  # tokens a second


def repeat_shard(prefix: str, tokens: int, target: Path) -> None:
    """A shard at `target` of at least so many tokens: the one at `prefix`, again and again."""
    source, made = ShardPaths.of(prefix), ShardPaths.of(target)
    manifest = Manifest.read(source.manifest)
    times = -(-tokens // manifest.tokens)
    content = source.bin.read_bytes()
    with made.bin.open("wb") as file:
        for _ in range(times):
            file.write(content)
    write_index(made.idx, np.dtype(manifest.dtype), np.tile(read_index(source.idx).sequence_lengths, times))
    made_of = {
        "documents": manifest.documents * times,
        "tokens": manifest.tokens * times,
        "bin_sha256": sha256_file(made.bin),
        "idx_sha256": sha256_file(made.idx),
    }
    Manifest(**vars(manifest) | made_of).write(made.manifest)


def read_batches(config: Config, mesh: Mesh) -> int:
    """An epoch through the training loader; returns its tokens."""
    data = TrainingData(config, mesh)
    steps = len(data.sources["all"]) // STEP
    for step in range(steps):
        data.micro_batches(step)
    return steps * config.tokens_per_step


def read_file(path: Path, itemsize: int) -> int:
    """The file from its beginning to its end, into one buffer: as fast as the system copies it. Returns its tokens."""
    buffer, size = bytearray(BUFFER), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size += count
    return size // itemsize


def forget(path: Path) -> None:
    """Have the system drop what it holds of the file in memory."""
    sync(path)  # what is not on the disk yet is not dropped
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def measure(config: Config, mesh: Mesh, repeats: int) -> dict[str, dict[str, float]]:
    """Median tokens a second by way of reading, from a cold and a warm cache in turn."""
    paths = ShardPaths.of(config.data.train)
    itemsize = np.dtype(Manifest.read(paths.manifest).dtype).itemsize
    ways = {
        "training loader": partial(read_batches, config, mesh),
        "whole file": partial(read_file, paths.bin, itemsize),
    }
    speeds: dict[str, dict[str, list[float]]] = {way: {"cold": [], "warm": []} for way in ways}
    for _ in range(repeats):
        for way, read in ways.items():
            forget(paths.bin)
            for cache in ("cold", "warm"):
                started = time.perf_counter()
                tokens = read()
                speeds[way][cache].append(tokens / (time.perf_counter() - started))
    return {way: {cache: statistics.median(s) for cache, s in found.items()} for way, found in speeds.items()}


def show(found: dict[str, dict[str, float]], console: Console) -> None:
    table = Table(box=SIMPLE_HEAD)
    for name in ("million tokens a second, one thread", "cold cache", "warm cache"):
        table.add_column(name, justify="left" if "," in name else "right")
    for way, speeds in found.items():
        table.add_row(way, *(f"{speeds[cache] / 1e6:,.1f}" for cache in ("cold", "warm")))
    console.print(table, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 where the loader is slower than TARGET, or 2 for arguments that don't fit."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    config = Config()
    config.data.seqlen, config.train.global_batch_size = options.seqlen, STEP
    record = provenance(CPU, "numpy")
    with tempfile.TemporaryDirectory(prefix="loader-benchmark-", dir=options.disk) as folder:
        config.data.train = f"{folder}/repeated"
        try:
            repeat_shard(options.prefix, int(options.tokens), Path(config.data.train))
            config.model.vocab_size = Manifest.read(ShardPaths.of(options.prefix).manifest).tokenizer.vocab_size
            size = ShardPaths.of(config.data.train).bin.stat().st_size
            with init_mesh(1) as mesh:
                found = measure(config, mesh, options.repeats)
        except (ShardError, ConfigError) as error:
            print(f"benchmark: {error}", file=sys.stderr)
            return 2
    console = Console()
    show(found, console)
    path = options.output / f"loader-{hardware_slug(CPU)}.json"
    settings = {"seqlen": options.seqlen, "bytes": size, "repeats": options.repeats}
    write_json(path, {**record, **settings, "tokens_per_second": found})
    console.print(f"recorded in {path}", highlight=False, soft_wrap=True)
    return int(min(found["training loader"].values()) < TARGET)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.benchmarks.loader", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("prefix", nargs="?", default="demo/shards/train", help="a shard (default: %(default)s)")
    parser.add_argument("--tokens", type=float, default=200e6, help="of the dataset that is read (default: 200e6)")
    parser.add_argument("--seqlen", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--disk", type=Path, default=Path("."), help="a folder on the disk to measure (default: .)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())

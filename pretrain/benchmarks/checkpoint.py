"""Command: what saving and loading a checkpoint takes, and from that an estimate for a larger model.

    python -m pretrain.benchmarks.checkpoint launch/configs/125m.yaml --for launch/configs/1p3b.yaml

One process saves and loads its whole state (fp32 masters and Adam's moments) on this machine's disk. Every part is
linear in the bytes, so the larger model's figures are these times the ratio of parameters: for one process and one
disk. Ranks share the work: each copies, writes and reads its own part.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kernels.benchmarks.record import hardware_slug, provenance, write_json
from longhorn_layers.config import ModelConfig
from longhorn_layers.model import LanguageModel, count_parameters
from pretrain import checkpoint
from pretrain.benchmarks import RESULTS
from pretrain.checkpoint import CheckpointWriter, Progress
from pretrain.config import Config, ConfigError, load_config
from pretrain.parallel.mesh import Mesh, init_mesh
from pretrain.parallel.zero import ZeroEngine

CPU = torch.device("cpu")
PARTS = {
    "held": "training held: the copy to host memory",
    "first held": "the same at the run's first save, which also gets that memory",
    "write": "written, synced, hashed, in the background",
    "verify": "hashed before it is loaded",
    "load": "read into the engine (from the page cache)",
}


def build_engine(config: Config, mesh: Mesh) -> ZeroEngine:
    """A model whose moments are no zeros, which a disk might not write."""
    engine = ZeroEngine(LanguageModel(config.model), config, mesh)
    for fragment in engine.fragments():
        for tensor in fragment.tensors.values():
            tensor.normal_()
    return engine


def measure(config: Config, mesh: Mesh, folder: Path, repeats: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each part by repeat, and the checkpoint's bytes."""
    config = replace(config, run_dir=str(folder), checkpoint=replace(config.checkpoint, keep_last=1))
    engine = build_engine(config, mesh)
    writer = CheckpointWriter(mesh, config, identity={}, tokenizer={})
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    size = 0
    for step in range(repeats + 1):
        writer.start(engine, Progress(step=step))
        report = writer.wait()
        assert report is not None
        seconds["held" if step else "first held"].append(report.held_seconds)
        seconds["write"].append(report.write_seconds)
        seconds["verify"].append(_timed(partial(checkpoint.verify, report.path)))
        seconds["load"].append(_timed(partial(checkpoint.load, engine, mesh, report.path, {})))
        size = report.size
    return seconds, size


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def results(seconds: dict[str, list[float]], size: int, measured: ModelConfig, other: ModelConfig) -> dict[str, Any]:
    """Medians for the measured model, and the other's by the ratio of parameters."""
    counts = {"measured": count_parameters(measured), "estimated": count_parameters(other)}
    ratio = counts["estimated"] / counts["measured"]
    medians = {part: statistics.median(values) for part, values in seconds.items()}
    return {
        "measured": {"parameters": counts["measured"], "bytes": size, "seconds": medians},
        "estimated": {
            "parameters": counts["estimated"],
            "bytes": round(size * ratio),
            "seconds": {part: value * ratio for part, value in medians.items()},
        },
    }


def show(found: dict[str, Any], console: Console) -> None:
    measured, estimated = found["measured"], found["estimated"]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("one process, one disk")
    table.add_column(f"{measured['parameters'] / 1e6:,.0f}M, measured", justify="right")
    table.add_column(f"{estimated['parameters'] / 1e6:,.0f}M, estimate", justify="right")
    table.add_row("size", f"{measured['bytes'] / 1e9:.2f} GB", f"{estimated['bytes'] / 1e9:.2f} GB")
    for part, what in PARTS.items():
        table.add_row(what, f"{measured['seconds'][part]:.2f} s", f"{estimated['seconds'][part]:.2f} s")
    console.print(table, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 for a config or arguments that don't fit."""
    options = _parser().parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.disk))
    try:
        config, other = load_config(options.config), load_config(options.other)
        # One process's share is all of it, whatever the config's own batch.
        config = replace(config, train=replace(config.train, micro_batch_size=1, global_batch_size=1))
        record = provenance(CPU, "deepspeed", "safetensors")
        with init_mesh(1) as mesh:
            found = results(*measure(config, mesh, folder, options.repeats), config.model, other.model)
    except (ConfigError, FileNotFoundError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(folder)
    console = Console()
    show(found, console)
    path = options.output / f"checkpoint-{hardware_slug(CPU)}.json"
    settings = {"config": options.config, "estimated_for": options.other, "repeats": options.repeats}
    write_json(path, {**record, **settings, "results": found})
    console.print(f"recorded in {path}", highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.benchmarks.checkpoint", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("config", nargs="?", default="launch/configs/125m.yaml", help="default: %(default)s")
    parser.add_argument("--for", dest="other", default="launch/configs/1p3b.yaml", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="after a first save (default: 3)")
    parser.add_argument("--disk", type=Path, default=Path("."), help="a folder on the disk to measure (default: .)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())

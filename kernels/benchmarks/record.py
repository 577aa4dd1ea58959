"""What a recorded time needs to mean anything later: hardware, versions, commit."""

import json
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kernels.cpp import FLAGS, find_compiler

ROOT = Path(__file__).parents[2]
# Records themselves: running a benchmark again does not make the code another one.
RECORDS = ("kernels/benchmarks/results", "pretrain/benchmark_results")
GPU_STATE = (
    *("driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem"),
    *("power.draw", "power.limit", "temperature.gpu", "clocks_throttle_reasons.active"),
)
ENVIRONMENT = re.compile(r"OMP_|KMP_|GOMP_|MKL_|MALLOC_|LD_PRELOAD|CUDA_VISIBLE|PYTORCH_|TRITON_")


def provenance(device: torch.device, *packages: str) -> dict[str, Any]:
    """Where, when and with what a benchmark runs; take it before the run, `load_average` shows the company.

    `packages`: distributions whose versions count, beside torch's and triton's.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "gpu": _gpu(device) if device.type == "cuda" else None,
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", *packages)},
            "cuda": torch.version.cuda,
            "compiler": _compiler_version(),
            "compiler_flags": " ".join(FLAGS),
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if ENVIRONMENT.match(k)},
    }


def hardware_slug(device: torch.device) -> str:
    """The hardware as part of a file name, like `intel-xeon-2.80ghz-2-cores` or `nvidia-h100-80gb-hbm3`."""
    name = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b", " ", hardware_name(device).lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-")


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many cores there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()} {os.cpu_count()} cores"


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _gpu(device: torch.device) -> dict[str, Any]:
    """What the GPU is, and (where nvidia-smi answers) its driver and state when asked, in nvidia-smi's words."""
    properties = torch.cuda.get_device_properties(device)
    known = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }
    answer = _output(
        *("nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader")
    )
    return known | dict(zip(GPU_STATE, (answer or "").split(", "), strict=False))


def _commit() -> dict[str, Any] | None:
    """The checked-out commit, and whether any file but the records differs from it.

    Outside git what $BENCHMARK_COMMIT says, for a copy of the files on a machine that has no repository; or None.
    """
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    exclude = (f":(exclude){folder}" for folder in RECORDS)
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", *exclude)
    if head is None:
        copied = os.environ.get("BENCHMARK_COMMIT")
        return {"hash": copied, "dirty": None} if copied else None
    return {"hash": head, "dirty": changes != ""}


def _compiler_version() -> str | None:
    compiler = find_compiler()
    return None if compiler is None else (_output(compiler, "--version") or "").partition("\n")[0]


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()

"""What has passed on this machine: a small file for each device, its software and this code.

The key holds a hash of the kernels' sources, not the commit: it is right in a changed checkout and in a copy without
git, and a commit that touches no kernel asks for no new test. The commit is written down beside it. A GPU is known by
its own number: one of a node may be broken while its neighbours are sound, and a folder that nodes share does no harm.
"""

import hashlib
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from kernels.benchmarks.record import provenance, write_json
from kernels.cpp import cache_root, find_compiler

SOURCES = Path(__file__).parents[1]
SUFFIXES = {".py", ".cpp", ".h"}

Identity = dict[str, str | None]


def identity(backend: str, device: torch.device) -> Identity:
    """All that a pass of `backend` on `device` depends on."""
    common: Identity = {"backend": backend, "torch": torch.__version__, "code": code_hash(SOURCES)}
    if backend == "cpu":
        return common | {"device": describe(device), "vectors": torch.backends.cpu.get_cpu_capability(), **_compiler()}
    import triton  # late: a CPU run needs no triton

    from kernels.triton_math import INTERPRETED

    common |= {"triton": triton.__version__, "interpreted": str(INTERPRETED)}
    if device.type == "cpu":
        return common | {"device": "Triton's interpreter", "python": platform.python_version()}
    gpu = torch.cuda.get_device_properties(device)
    return common | {
        "device": f"{gpu.name} {gpu.uuid}",
        "capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def describe(device: torch.device) -> str:
    """Where a person finds it: the node, and its GPU's name and number."""
    if device.type == "cpu":
        return f"{platform.node()} ({platform.machine()})"
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name} {gpu.uuid} of {platform.node()}"


def code_hash(folder: Path) -> str:
    """Of the names and contents of all sources below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def passed(identity: Identity) -> dict[str, Any] | None:
    """The record of an earlier pass; None where there is none that can be read."""
    try:
        record = json.loads(_path(identity).read_text())
        return record if record["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(identity: Identity, device: torch.device) -> None:
    """Write down a pass. Raises OSError where the folder cannot be written."""
    write_json(_path(identity), {"identity": identity, **provenance(device)})


def _path(identity: Identity) -> Path:
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root() / "selftest" / f"{identity['backend']}-{key}.json"


def _compiler() -> Identity:
    """Of the C++ engines; without one torch's run."""
    compiler = find_compiler()
    if compiler is None:
        return {"compiler": None}
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return {"compiler": version.stdout.partition("\n")[0]}


def _driver() -> str | None:
    """The kernel module's version; nvidia-smi would take a second."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        return None

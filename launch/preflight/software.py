"""What a node's Python can do, asked of a process of its own: an import may hang or crash.

    python -m launch.preflight.software CONFIG [key=value …]

Imports what training needs, reads the code, the config and its shards' manifests, and prints a `Software` as its last
line.
"""

import hashlib
import platform
import sys
from dataclasses import dataclass, field
from importlib import import_module

import orjson
from pydantic import TypeAdapter

from launch.preflight.command import CommandError, ask
from launch.preflight.findings import Finding, Level

ROOMS = ("kernels", "longhorn_layers", "pretrain", "data_tools", "launch")
MISSING = "missing"
PACKAGES = ("torch", "triton", "megatron.core", "deepspeed")
SOFTWARE_SECONDS = 70.0  # from a shared disk that nobody has read yet, torch alone takes half a minute


@dataclass
class Software:
    """`import_errors` by package. What follows `config_error` is known where the config is right."""

    versions: dict[str, str] = field(default_factory=dict)
    import_errors: dict[str, str] = field(default_factory=dict)
    code: str | None = None
    config_error: str | None = None
    checkpoint_bytes: int | None = None
    keep_last: int = 1
    shards: dict[str, str] = field(default_factory=dict)  # config key → what lies there


def ask_software(config: str, overrides: list[str]) -> tuple[Software, list[Finding]]:
    """What is known, and the findings that follow; where the process crashes or hangs, that is the finding."""
    command = (sys.executable, "-m", "launch.preflight.software", config, *overrides)
    try:
        text = ask(*command, seconds=SOFTWARE_SECONDS)
    except CommandError as error:
        return Software(), [Finding("software", "bad", str(error))]
    # Packages print lines of their own before.
    software = TypeAdapter(Software).validate_json(text.splitlines()[-1])
    return software, _findings(software, config)


def _findings(software: Software, config: str) -> list[Finding]:
    versions = ", ".join(f"{name} {version}" for name, version in software.versions.items())
    errors = [f"import {package}: {error}" for package, error in software.import_errors.items()]
    found = [Finding.of("software", errors, versions, same=True)]
    if software.code:
        found.append(Finding("code", "ok", software.code, same=True))
    if software.config_error:
        return [*found, Finding("config", "bad", software.config_error)]
    if software.checkpoint_bytes:
        shards = ", ".join(f"{key} {shard}" for key, shard in software.shards.items())
        # Missing on every node, it is no node's fault: the trainer says what to do, and is not started again.
        level: Level = "warning" if MISSING in software.shards.values() else "ok"
        found += [Finding("config", "ok", config), Finding("data", level, shards or "none is set", same=True)]
    return found


def find_software(config: str, overrides: list[str]) -> Software:
    software = Software({"python": platform.python_version()})
    for package in PACKAGES:
        try:
            software.versions[package] = str(getattr(import_module(package), "__version__", "of unknown version"))
        except Exception as error:  # a package may fail to load in any way
            software.import_errors[package] = f"{type(error).__name__}: {error}"
    if "torch" not in software.import_errors:
        software.code = _code()
        _read_config(software, config, overrides)
    return software


def _code() -> str:
    """The commit, and a hash of what lies there: "+changes" does not tell one change from another."""
    from kernels.selftest.record import code_hash
    from pretrain.provenance import ROOT, code_commit

    sources = "".join(code_hash(ROOT / room) for room in ROOMS)
    return f"{code_commit()}, sources {hashlib.sha256(sources.encode()).hexdigest()[:12]}"


def _read_config(software: Software, path: str, overrides: list[str]) -> None:
    from pretrain.config import load_config
    from pretrain.memory import MASTER_AND_MOMENTS, ParameterCounts

    try:
        config = load_config(path, overrides)
    except (ValueError, FileNotFoundError) as error:
        software.config_error = str(error)
        return
    software.checkpoint_bytes = MASTER_AND_MOMENTS * ParameterCounts.of(config.model).total
    software.keep_last = config.checkpoint.keep_last
    for key, prefix in {"data.train": config.data.train, "data.valid": config.data.valid}.items():
        if prefix:
            software.shards[key] = _shard(prefix)


def _shard(path: str) -> str:
    """The identity of a dataset, or of a shard, as seen from this node."""
    from data_tools.dataset import open_dataset
    from data_tools.shards import ShardError

    try:
        return open_dataset(path).digest[:12]
    except (ShardError, OSError):
        return MISSING


if __name__ == "__main__":
    print("\n" + orjson.dumps(find_software(sys.argv[1], sys.argv[2:])).decode())

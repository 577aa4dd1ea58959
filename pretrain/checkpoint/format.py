"""What a checkpoint's manifest holds, and the names of its files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from data_tools.files import write_durably
from pretrain.parallel.tensor_parallel import Sharding

FORMAT_VERSION = 2
MANIFEST, MANIFEST_DIGEST = "manifest.json", "manifest.sha256"


class CheckpointError(RuntimeError):
    """No checkpoint, a damaged one, or another run's; the message names it."""


@dataclass(frozen=True)
class RankFile:
    """One rank's file; `fragments` maps a parameter's name to (start, numel) in its flattened tensor shard."""

    name: str
    size: int
    sha256: str
    tensor_rank: int
    fragments: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    `optimizer_steps` is what Adam's bias correction counts: skipped steps consume tokens and update nothing.
    `recent_losses`: of the last trained steps, where spikes are looked for (pretrain/guard.py).
    """

    step: int = 0
    consumed_tokens: int = 0
    optimizer_steps: int = 0
    recent_losses: tuple[float, ...] = ()

    @property
    def skipped_steps(self) -> int:
        return self.step - self.optimizer_steps


@dataclass(frozen=True)
class CheckpointManifest:
    """`identity` holds what a resumed run must share with this one: model, data, batch, optimizer, seed.

    `validation_loss`: in nats per token, where it was measured at this very step.
    """

    format_version: int
    progress: Progress
    validation_loss: float | None
    tensor_size: int
    parameters: dict[str, Sharding]
    files: list[RankFile]
    identity: dict[str, Any]
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    commit: str
    versions: dict[str, str]


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def rank_file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def checkpoints_in(run_dir: Path) -> list[Path]:
    """Folders of a run's checkpoints, oldest first, sound or not; a copy that somebody made beside them is none."""
    return sorted((run_dir / "checkpoints").glob("step_" + "[0-9]" * 8))


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """The manifest, and its digest as `sha256sum` writes it: a flipped digit is still JSON."""
    content = orjson.dumps(manifest, option=orjson.OPT_INDENT_2)
    write_durably(folder / MANIFEST, content)
    write_durably(folder / MANIFEST_DIGEST, _digest_line(content))


def _digest_line(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()


def read_manifest(folder: Path) -> CheckpointManifest:
    """A checkpoint's manifest. Raises CheckpointError where it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        if (folder / MANIFEST_DIGEST).read_bytes() != _digest_line(content):
            raise CheckpointError(f"{path} is damaged: its sha256 is not that of {MANIFEST_DIGEST}")
        manifest = TypeAdapter(CheckpointManifest).validate_json(content)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {manifest.format_version}; this code reads {FORMAT_VERSION}")
    return manifest

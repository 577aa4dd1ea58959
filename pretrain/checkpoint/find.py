"""Finding the checkpoint to go on from: verified, and the same one on every rank."""

import itertools
import os
from collections.abc import Collection
from pathlib import Path

from data_tools.files import sha256_file, write_durably
from pretrain.checkpoint.format import (
    MANIFEST,
    CheckpointError,
    CheckpointManifest,
    RankFile,
    checkpoints_in,
    read_manifest,
    step_name,
)
from pretrain.parallel.mesh import Mesh
from pretrain.say import say

ASIDE = "set_aside_"


def verify(folder: Path) -> CheckpointManifest:
    """Check every file's size and hash. Raises CheckpointError naming the first that differs."""
    manifest = read_manifest(folder)
    for file in manifest.files:
        _verify_file(folder, file)
    return manifest


def _verify_file(folder: Path, file: RankFile) -> None:
    path = folder / file.name
    try:
        sound = path.stat().st_size == file.size and sha256_file(path) == file.sha256
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if not sound:
        raise CheckpointError(f"{path} is damaged: its size or sha256 is not the manifest's")


def newest(run_dir: Path) -> Path | None:
    """The newest sound checkpoint, or None where the run has none; says which damaged ones it passed over.

    Raises CheckpointError where there are checkpoints but none is sound: a run never starts anew by surprise.
    """
    folders = checkpoints_in(run_dir)
    for folder in reversed(folders):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            _pass_over(str(error))
    if folders:
        raise _none_sound(run_dir, len(folders))
    return None


def resolve(path: Path) -> Path:
    """A checkpoint folder as it is (verified), or the newest sound one of a run folder."""
    if (path / MANIFEST).is_file():
        verify(path)
        return path
    if (path / "checkpoints").is_dir() and (folder := newest(path)):
        return folder
    raise CheckpointError(f"{path}: neither a run with checkpoints nor a checkpoint (checkpoints/step_…)")


def choose(mesh: Mesh, run_dir: Path, step: int | None = None, avoid: Collection[int] = ()) -> Path | None:
    """What `newest` finds, or the checkpoint of `step`, on every rank; ranks share the hashing.

    `avoid`: steps to pass over as long as there are others. Raises CheckpointError on every rank: where none is sound,
    where the named one is missing or damaged, and where all are gone that `latest` says there were.
    """
    names, latest = mesh.from_first(_names_and_latest(run_dir) if mesh.rank == 0 else None)
    if latest and not names:
        raise CheckpointError(f"{run_dir}/latest names {latest}, but no checkpoint is there; remove it to start anew")
    if step is not None and step_name(step) not in names:
        has = ", ".join(str(int(name.removeprefix("step_"))) for name in names) or "none"
        raise CheckpointError(f"{run_dir}: no checkpoint of step {step}; it has {has}")
    if mesh.rank == 0 and names and latest > names[-1]:
        _pass_over(f"{run_dir}/latest names {latest}, which is gone")
    avoided = {step_name(number) for number in avoid}
    order = sorted(names, key=lambda name: (name not in avoided, name), reverse=True)
    for name in order if step is None else [step_name(step)]:
        folder = run_dir / "checkpoints" / name
        problems = sorted({p for p in mesh.gather_objects(_problem(mesh, folder)) if p})
        if not problems:
            return folder
        if step is not None:
            raise CheckpointError("; ".join(problems))
        if mesh.rank == 0:
            for problem in problems:
                _pass_over(problem)
    if names:
        raise _none_sound(run_dir, len(names))
    return None


def _names_and_latest(run_dir: Path) -> tuple[list[str], str]:
    path = run_dir / "latest"
    return [folder.name for folder in checkpoints_in(run_dir)], path.read_text() if path.exists() else ""


def _problem(mesh: Mesh, folder: Path) -> str | None:
    """What this rank finds wrong with the manifest or its share of the files."""
    try:
        for file in read_manifest(folder).files[mesh.rank :: mesh.world_size]:
            _verify_file(folder, file)
    except CheckpointError as error:
        return str(error)
    return None


def set_back(folder: Path) -> None:
    """Make `folder` its run's newest checkpoint: later ones, damaged or left behind, are set aside, never lost."""
    for later in checkpoints_in(folder.parent.parent):
        if later > folder:
            set_aside(later)
    write_durably(folder.parent.parent / "latest", folder.name.encode())


def set_aside(folder: Path) -> None:
    """Take a checkpoint out of the run under a name that nothing looks for; it stays on disk."""
    if not folder.exists():
        return
    names = (folder.with_name(f"{ASIDE}{folder.name}{f'.{n}' if n else ''}") for n in itertools.count())
    free = next(name for name in names if not name.exists())
    os.rename(folder, free)
    say(f"checkpoint set aside: {folder} is now {free}", problem=True)


def _pass_over(problem: str) -> None:
    say(f"checkpoint passed over: {problem}", problem=True)


def _none_sound(run_dir: Path, count: int) -> CheckpointError:
    return CheckpointError(f"{run_dir}: none of its {count} checkpoints is sound; remove them to start anew")

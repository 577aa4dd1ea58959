"""Which checkpoints a run keeps: the last few, every so many steps, the best."""

import math
import os
import shutil
from pathlib import Path

from pretrain.checkpoint.format import CheckpointError, read_manifest
from pretrain.config import CheckpointConfig

REMOVED = ".removed_"  # a folder being removed: a kill in between leaves no half checkpoint under its name


def kept(folders: list[Path], config: CheckpointConfig) -> set[Path]:
    """Those of `folders` (oldest first) that a rule keeps."""
    keep = set(folders[-config.keep_last :])
    if config.keep_every:
        steps = {f: int(f.name.removeprefix("step_")) for f in folders}
        keep |= {f for f, step in steps.items() if step and step % config.keep_every == 0}
    if config.keep_best and folders:
        best = min(folders, key=_validation_loss)
        keep |= {best} if math.isfinite(_validation_loss(best)) else set()
    return keep


def _validation_loss(folder: Path) -> float:
    try:
        loss = read_manifest(folder).validation_loss
    except CheckpointError:
        return math.inf
    return math.inf if loss is None else loss


def forget_old(newest: Path, config: CheckpointConfig) -> None:
    """Remove what no rule keeps of `newest` and the ones before it."""
    folders = [f for f in sorted(newest.parent.glob("step_*")) if f <= newest]
    for folder in sorted(set(folders) - kept(folders, config)):
        doomed = folder.with_name(REMOVED + folder.name)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)

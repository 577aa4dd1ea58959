"""Which checkpoints a run keeps: the last few, every so many steps, the best."""

import math
import os
import shutil
from pathlib import Path

from pretrain.checkpoint.format import CheckpointError, checkpoints_in, read_manifest
from pretrain.config import CheckpointConfig
from pretrain.say import say

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
    """Remove what no rule keeps of `newest` and the ones before it; what can't be removed now is left for later."""
    folders = [f for f in checkpoints_in(newest.parent.parent) if f <= newest]
    for folder in sorted(set(folders) - kept(folders, config)):
        doomed = folder.with_name(REMOVED + folder.name)
        try:
            os.rename(folder, doomed)
            shutil.rmtree(doomed)
        except OSError as error:  # NFS keeps a file that somebody still reads
            say(f"old checkpoint not removed: {error}", problem=True)

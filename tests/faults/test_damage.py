"""A file of the newest checkpoint cut, flipped or gone: found at the next start, and the one before it is used."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint import CheckpointError, verify

SLOW = [pytest.mark.slow, pytest.mark.fault]
FILES = ("rank_00000.safetensors", "rank_00001.safetensors", "manifest.json", "manifest.sha256", "latest")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    flip_bit(path, random.Random(path.name).randrange(8 * path.stat().st_size))


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.fixture(scope="module")
def stopped(new_job):  # type: ignore[no-untyped-def]
    """A job that was asked to stop in step 18, with checkpoints of steps 6, 12, 18."""
    job = new_job(2)
    job.start({"point": "step", "match": "^18$", "act": "signal all", "argument": ["SIGUSR1"], "rank": 0})
    assert job.last_step == 18 and job.checkpoints() == [6, 12, 18]
    return job


@pytest.fixture
def copy(stopped, new_job):  # type: ignore[no-untyped-def]
    """That job's run again, for a test to damage."""
    job = new_job(2)
    shutil.copytree(stopped.run_dir, job.run_dir)
    job.record(**vars(stopped.starts[0]) | {"acted": []})  # the damage is found at the start
    return job


def damaged(job, name: str) -> Path:  # type: ignore[no-untyped-def]
    return job.run_dir / name if name == "latest" else job.run_dir / "checkpoints/step_00000018" / name


def damage_cases() -> list:  # type: ignore[type-arg]
    fast = {(flip, "rank_00001.safetensors"), (flip, "manifest.json")}
    cases = [(how, name) for name in FILES for how in (flip, truncate, halve, empty, Path.unlink)]
    return [pytest.param(*c, id=f"{c[0].__name__}-{c[1]}", marks=[] if c in fast else SLOW) for c in cases]


@pytest.mark.parametrize(("damage", "name"), damage_cases())
def test_a_damaged_file(copy, recovery, damage: Callable[[Path], None], name: str) -> None:  # type: ignore[no-untyped-def]
    damage(damaged(copy, name))
    needed = name != "latest"  # it is for people and scripts; the run looks for itself
    again = recovery.finish(copy, f"{damage.__name__} {name}", allowed=6)
    assert again.resumed_at == (12 if needed else 18)
    assert ("checkpoint passed over: " in again.log) == needed
    # What was damaged is set aside for people to look at, and not in the way of the same step's next one.
    aside = copy.run_dir / "checkpoints/set_aside_step_00000018"
    assert aside.is_dir() == needed and verify(copy.run_dir / "checkpoints/step_00000018")
    assert (copy.run_dir / "latest").read_text() == "step_00000024"


@pytest.mark.slow
@pytest.mark.fault
def test_a_checkpoint_that_is_gone(copy, recovery) -> None:  # type: ignore[no-untyped-def]
    shutil.rmtree(copy.run_dir / "checkpoints/step_00000018")
    recovery.finish(copy, "checkpoint removed", allowed=6)


@pytest.mark.slow
@pytest.mark.fault
def test_no_sound_checkpoint_is_no_fresh_start(copy, recovery) -> None:  # type: ignore[no-untyped-def]
    files = sorted(copy.run_dir.glob("checkpoints/*/rank_00001.safetensors"))
    before = {file: file.read_bytes() for file in files}
    for file in files:
        flip(file)
    start = copy.start()
    assert start.codes == [2, 2] and "none of its 3 checkpoints is sound" in start.log
    assert copy.status["reason"] == "bad_input" and copy.checkpoints() == [6, 12, 18] and copy.last_step == 18
    files[-1].write_bytes(before[files[-1]])
    recovery.finish(copy, "every checkpoint damaged, the newest repaired by hand")


def test_every_flipped_bit_of_a_manifest_is_seen(stopped, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A flipped digit is still JSON; and 500 bits of the ranks' files, headers too."""
    folder = tmp_path / "step_00000018"
    shutil.copytree(stopped.run_dir / "checkpoints/step_00000018", folder)
    verify(folder)
    draw = random.Random(6)
    for path in sorted(folder.iterdir()):
        bits = range(8 * path.stat().st_size)
        chosen = [*bits[:64], *draw.sample(bits, 186)] if path.suffix == ".safetensors" else draw.sample(bits, 500)
        for bit in chosen:
            flip_bit(path, bit)
            with pytest.raises(CheckpointError, match=r"manifest|rank_0000|checkpoint"):
                verify(folder)
            flip_bit(path, bit)
    verify(folder)

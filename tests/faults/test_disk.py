"""A full or read-only disk: a clear stop that loses nothing saved, and the run goes on when there is room."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SLOW = [pytest.mark.slow, pytest.mark.fault]


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path], None]]:
    """Mounts a tmpfs of 4 MB over a folder, which needs root."""
    mounted = []

    def mount(folder: Path) -> None:
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a small disk needs root and CAP_SYS_ADMIN: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_stopped_at_a_save(job, start, message: str) -> None:  # type: ignore[no-untyped-def]
    assert start.codes == [1, 1]
    assert job.status["reason"] == "checkpoint" and message in job.status["detail"], job.status
    assert job.checkpoints()[-1] == 6 and not job.done
    assert not list(job.run_dir.glob("checkpoints/.partial_*"))  # room for what people do next


@pytest.mark.parametrize(
    ("rank", "point", "match"),
    [
        (1, "tensors", "step_00000012"),
        pytest.param(0, "tensors", "step_00000012", marks=SLOW),
        pytest.param(0, "bytes", "step_00000012/manifest.json", marks=SLOW),
        pytest.param(0, "rename", "step_00000012", marks=SLOW),
    ],
)
def test_a_write_that_fails(new_job, recovery, rank, point, match) -> None:  # type: ignore[no-untyped-def]
    job = new_job(2)
    start = job.start({"point": point, "match": match, "act": "no space", "rank": rank})
    assert_stopped_at_a_save(job, start, "No space left")
    recovery.finish(job, f"no space at the {point} of {match}, rank {rank}")


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("disk", ["checkpoints", "."])
def test_a_full_disk(new_job, recovery, small_disk, disk: str) -> None:  # type: ignore[no-untyped-def]
    """Of the checkpoints alone, or of all of the run's files: then metrics.jsonl and status.json too."""
    job = new_job(2)
    small_disk(job.run_dir / disk)
    filler = job.run_dir / disk / "filler"
    start = job.start({"point": "step", "match": "^9$", "act": "fill", "argument": str(filler), "rank": 0})
    assert_stopped_at_a_save(job, start, "No space left")
    again = job.start()  # nothing has changed: it says so again, and stays sound
    assert again.codes == [1, 1] and job.checkpoints()[-1] == 6, again.log
    filler.unlink()
    recovery.finish(job, f"full disk under {'the run folder' if disk == '.' else disk}")


@pytest.mark.slow
@pytest.mark.fault
def test_a_directory_that_becomes_read_only(new_job, recovery, small_disk) -> None:  # type: ignore[no-untyped-def]
    job, remount = new_job(2), ["mount", "-o"]
    folder = job.run_dir / "checkpoints"
    small_disk(folder)
    command = [*remount, "remount,ro", str(folder)]
    start = job.start({"point": "step", "match": "^9$", "act": "run", "argument": command, "rank": 0})
    assert start.codes == [1, 1] and job.checkpoints() == [0, 6]
    assert job.status["reason"] == "checkpoint" and "Read-only file system" in job.status["detail"]
    subprocess.run([*remount, "remount,rw", str(folder)], check=True)
    recovery.finish(job, "checkpoints become read-only")


@pytest.mark.slow
@pytest.mark.fault
def test_a_run_directory_that_was_never_writable(new_job, recovery, small_disk) -> None:  # type: ignore[no-untyped-def]
    job = new_job(2)
    small_disk(job.run_dir)
    os.statvfs(job.run_dir)
    subprocess.run(["mount", "-o", "remount,ro", str(job.run_dir)], check=True)
    start = job.start()
    assert any(start.codes) and "Read-only file system" in start.log and str(job.run_dir) in start.log
    subprocess.run(["mount", "-o", "remount,rw", str(job.run_dir)], check=True)
    recovery.finish(job, "run folder read-only from the start")

"""Under the real torchrun: it tells its workers of signals and of each other's ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.fault]
HERE = Path(__file__).parent


def torchrun(job, fault: dict) -> int:  # type: ignore[no-untyped-def, type-arg]
    """Start the job's command by torchrun with a fault; its exit code."""
    faults, log = job.folder / "faults.json", job.folder / "torchrun.faults"
    faults.write_text(json.dumps([fault]))
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={job.world}"]
        + [str(HERE / "torchrun_rank.py"), str(faults), str(log), *job.arguments],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    acted = [json.loads(line) for line in log.read_text().splitlines()]
    job.record([done.returncode], started, time.time(), done.stdout + done.stderr, acted)
    return done.returncode


def test_a_killed_worker(new_job, recovery) -> None:  # type: ignore[no-untyped-def]
    job = new_job(2)
    assert torchrun(job, {"point": "step", "match": "^15$", "after": 0.004, "act": "kill", "rank": 1}) == 1
    again = recovery.finish(job, "torchrun: kill -9 of a worker in step 15")
    assert again.resumed_at in (6, 12)


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_a_signal_to_torchrun(new_job, recovery, signal: str) -> None:  # type: ignore[no-untyped-def]
    """It passes it on and waits; its own code is then not 0, so that status.json is what counts."""
    job = new_job(2)
    torchrun(job, {"point": "step", "match": "^9$", "act": "signal launcher", "argument": signal, "rank": 0})
    assert job.status["reason"] == "signal" and job.status["step"] == job.last_step == job.checkpoints()[-1]
    recovery.finish(job, f"torchrun: {signal} in step 9")


def test_usr1_to_the_workers(new_job, recovery) -> None:  # type: ignore[no-untyped-def]
    """As the launch script sends it: torchrun itself ignores it, and ends well."""
    job = new_job(2)
    assert torchrun(job, {"point": "step", "match": "^9$", "act": "signal", "argument": "SIGUSR1", "rank": 1}) == 0
    assert job.status["reason"] == "signal" and job.last_step == 9
    recovery.finish(job, "torchrun: USR1 to a worker in step 9")

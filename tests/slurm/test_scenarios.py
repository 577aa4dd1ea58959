"""What happens to jobs on a cluster, to the production scripts as they are; then every loss is an undisturbed run's."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

STEP = 60  # disturbed at this step of 200: there is a checkpoint, of step 50, and most is still to come


@pytest.fixture
def same_losses(undisturbed, record_property) -> Callable:
    """Asserts that a run is complete, each step's loss to the last bit the undisturbed run's; notes what happened."""

    def check(run, happened: str) -> None:
        assert run.done and run.status()["reason"] == "done"
        assert run.losses() == undisturbed.run.losses()
        record_property("happened", happened)

    return check


def test_whole_run(undisturbed, record_property):
    run, job = undisturbed.run, undisturbed.job
    losses = run.losses()
    assert [step for step, _ in losses] == list(range(1, 201))
    assert losses[-1][1] < losses[0][1] - 1
    assert run.done and run.status()["reason"] == "done" and run.saved_step() == 200
    facts = job.facts()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "0")
    assert facts["NodeList"] == "node[1-2]" and facts["TresPerNode"] == "gres:gpu:8"
    assert "tensor parallel 1 × data parallel 2" in job.text()
    logs = run.path / "logs" / f"{job.id}.0"
    assert all(list((logs / f"node{rank}").rglob("std*.log")) for rank in (0, 1)), list(logs.rglob("*"))
    record_property("happened", "DONE at step 200, no restart")


def test_time_limit(site, run_to_disturb, same_losses):
    """Slurm's signal ten minutes before it: saved, requeued by the script, resumed."""
    run = run_to_disturb
    job = site.submit(run)
    job.wait_for(lambda: run.step() >= STEP, f"step {STEP}")
    job.reach_time_limit()
    job.wait_for(lambda: job.restarts == 1, "requeue")
    stopped_at = run.saved_step()
    assert STEP <= stopped_at < 200 and not run.done
    assert run.status()["reason"] == "signal" and run.status()["step"] == stopped_at
    site.cluster.slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.wait_for_end()
    assert job.restarts == 1
    assert f"step_{stopped_at:08d}" in job.text().rpartition("requeue")[2]
    same_losses(run, f"USR1 by Slurm, saved step {stopped_at}, requeued, resumed there")


def test_cancelled_link_of_a_chain(site, run_to_disturb, same_losses):
    """TERM saves within KillWait; the next job of the name goes on from there, the one after has nothing to do."""
    run = run_to_disturb
    links = [site.submit(run, "--dependency=singleton") for _ in range(3)]
    links[0].wait_for(lambda: run.step() >= STEP, f"step {STEP}")
    assert [link.state for link in links] == ["RUNNING", "PENDING", "PENDING"]
    links[0].cancel()
    links[0].wait_for_end("CANCELLED")
    saved = run.saved_step()
    assert STEP <= saved < 200 and run.status()["reason"] == "signal" and run.status()["step"] == saved
    assert links[0].restarts == 0
    links[1].wait_for_end()
    same_losses(run, f"scancel, saved step {saved}, the next job went on, the last had nothing to do")
    links[2].wait_for_end()
    assert "is done" in links[2].text()
    assert not (run.path / "logs" / f"{links[2].id}.0").exists()


def test_requeue_from_outside(site, run_to_disturb, same_losses):
    run = run_to_disturb
    job = site.submit(run, script="launch/350m.sh")
    job.wait_for(lambda: run.step() >= STEP, f"step {STEP}")
    site.cluster.slurm("scontrol", "requeue", job.id)
    job.wait_for(lambda: job.restarts == 1 and job.state == "RUNNING", "a second start")
    saved = run.saved_step()
    assert STEP <= saved < 200
    job.wait_for_end()
    assert job.restarts == 1
    assert (run.path / "logs" / f"{job.id}.1").is_dir()
    same_losses(run, f"scontrol requeue, saved step {saved}, resumed there")


def test_killed_worker(site, run_to_disturb, same_losses):
    run = run_to_disturb
    job = site.submit(run, script="launch/125m.sh")
    job.wait_for(lambda: run.step() >= STEP, f"step {STEP}")
    [worker] = site.cluster.nodes["node2"].workers()
    os.kill(worker, signal.SIGKILL)
    job.wait_for(lambda: job.restarts == 1, "requeue")
    saved = run.saved_step()
    assert saved % 50 == 0 and 50 <= saved < 200
    job.wait_for_end()
    assert job.restarts == 1
    same_losses(run, f"kill -9 of a rank, requeued, resumed at step {saved}")


def test_node_without_power(site, run_to_disturb, same_losses):
    """No process of it says goodbye. Slurm notices, requeues, and gives the job the spare node."""
    run = run_to_disturb
    job = site.submit(run)
    job.wait_for(lambda: run.step() >= STEP, f"step {STEP}")
    assert job.facts()["NodeList"] == "node[1-2]"
    with site.cluster.without_power("node2"):
        job.wait_for(lambda: job.restarts == 1 and job.state == "RUNNING", "a second start")
    assert job.facts()["NodeList"] == "node[1,3]"
    job.wait_for_end()
    assert job.restarts == 1
    same_losses(run, "node down, requeued by Slurm on the spare node")


def test_bad_node(site, run_to_disturb, same_losses):
    """The preflight finds it; the job goes on without it and says so."""
    run = run_to_disturb
    with site.cluster.nameless("node2"):
        job = site.submit(run)
        job.wait_for_end()
    assert job.facts()["NodeList"] == "node[1,3]" and job.facts()["ExcNodeList"] == "node2"
    assert job.restarts == 1
    assert "bad nodes: node2" in job.text()
    [line] = (run.path / "excluded_nodes").read_text().splitlines()
    assert line.startswith("node2 ") and f"job {job.id}.0" in line
    same_losses(run, "found by the preflight, excluded, requeued on the spare node")


def test_full_disk(site, run_to_disturb, same_losses):
    """A clear stop that loses nothing already saved; with room again, the same command goes on."""
    run, disk = run_to_disturb, site.cluster.small_disk
    run.path.mkdir(parents=True)
    (run.path / "checkpoints").symlink_to(disk)
    job = site.submit(run, MAX_TRIES="1")
    job.wait_for(lambda: run.step() >= STEP and run.saved_step() >= 50, f"step {STEP}")
    fill(disk / "somebody_elses")
    job.wait_for_end("FAILED")
    assert job.restarts == 1  # the first attempt had written a checkpoint, and counts as no failed try
    assert "giving up" in job.text()
    status = run.status()
    assert status["reason"] == "checkpoint" and "No space left on device" in str(status["detail"])
    saved = run.saved_step()
    assert 50 <= saved < int(str(status["step"])) <= saved + 60
    (disk / "somebody_elses").unlink()
    site.submit(run).wait_for_end()
    same_losses(run, f"tried twice, given up with step {saved} saved; with room again: resumed there")


def fill(path: Path) -> None:
    """Take all that is left of a disk."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


def test_job_array(site, run_to_disturb, same_losses):
    """The links take turns at one run: the first is told of its time limit, the second goes on, the others end."""
    run = run_to_disturb
    links = site.submit(run, "--array=1-3%1").tasks(1, 2, 3)
    links[0].wait_for(lambda: run.step() >= STEP, f"step {STEP}")
    assert links[1].state == "PENDING"
    links[0].reach_time_limit()
    links[1].wait_for(lambda: links[1].state == "RUNNING", "link 2's start")
    saved = run.saved_step()
    assert STEP <= saved < 200
    links[1].wait_for_end()
    assert run.done
    for link in (links[2], links[0]):
        link.wait_for_end()
        assert "is done" in link.text()
    assert links[0].restarts == 1
    same_losses(run, f"USR1 to link 1, saved step {saved}, link 2 went on, the others ended at once")


def test_stop_file(site, run_to_disturb, same_losses):
    """Saved, and nothing starts again until a person removes it."""
    run = run_to_disturb
    job = site.submit(run)
    job.wait_for(lambda: run.step() >= STEP, f"step {STEP}")
    (run.path / "STOP").touch()
    job.wait_for_end()
    assert job.restarts == 0 and not run.done
    stopped_at = run.saved_step()
    assert STEP <= stopped_at < 200
    assert run.status()["reason"] == "stop_file" and run.status()["step"] == stopped_at
    again = site.submit(run)
    again.wait_for_end()
    assert again.restarts == 0 and run.step() == stopped_at
    assert "STOP" in again.text()
    (run.path / "STOP").unlink()
    site.submit(run).wait_for_end()
    same_losses(run, f"saved step {stopped_at}, not requeued, refused while STOP is there, then resumed")

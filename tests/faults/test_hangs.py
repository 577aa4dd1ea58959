"""SIGSTOP of a rank: the watchdog ends the job, says where each rank was, and the run goes on."""

import pytest

SLOW = [pytest.mark.slow, pytest.mark.fault]
TIMEOUT = "recovery.step_timeout=4"


@pytest.mark.parametrize(
    ("point", "match", "rank", "after"),
    [
        ("step", "^9$", 1, None),
        pytest.param("step", "^9$", 0, 0.003, marks=SLOW),
        pytest.param("tensors", "step_00000012", 1, None, marks=SLOW),
        pytest.param("rename", "step_00000012", 0, None, marks=SLOW),
        pytest.param("validation", "", 1, None, marks=SLOW),
    ],
)
def test_a_stopped_rank(new_job, recovery, point, match, rank, after) -> None:  # type: ignore[no-untyped-def]
    job = new_job(2, TIMEOUT)
    fault = {"point": point, "match": match, "after": after, "act": "stop", "rank": rank}
    start = job.start(fault, grace=1)
    assert start.codes[1 - rank] == 1 and start.codes[rank] == -9
    assert job.status["reason"] == "hang"
    assert f"rank {rank}: no answer: stopped or gone" in job.status["detail"], job.status
    [folder] = (job.run_dir / "logs").glob("hang-*")
    stacks = (folder / f"rank_{1 - rank:05d}.txt").read_text()
    assert "trainer.py" in stacks and not (folder / f"rank_{rank:05d}.txt").exists()
    assert start.detected_in < 4 + 20  # of a collective's ten minutes; the machine may be busy
    recovery.finish(job, f"SIGSTOP of rank {rank} in {point} {match.strip('^$')}", TIMEOUT)

"""USR1, TERM, INT, 20 TERMs, stop files, in every phase: the step is finished and saved, and no step is lost."""

import pytest

SLOW = [pytest.mark.slow, pytest.mark.fault]
SIGNALS = {"USR1": ["SIGUSR1"], "TERM": ["SIGTERM"], "INT": ["SIGINT"], "20 TERMs": ["SIGTERM"] * 20}
# Phase → where the signal comes, and when: (point, what about, seconds after it began).
PHASES = {
    "data building": ("data", "", None),
    "model building": ("model", "", None),
    "the first step": ("step", "^1$", 0.002),
    "the step's beginning": ("step", "^9$", None),
    "a step": ("step", "^9$", 0.005),
    "a save's writing": ("tensors", "step_00000012", None),
    "a save's rename": ("rename", "/step_00000012$", None),
    "validation": ("validation", "", None),
    "the last save": ("rename", "/step_00000024$", None),
    "the very end": ("replace", "/DONE$", None),
}


def cases() -> list:  # type: ignore[type-arg]
    fast = {("USR1", "a save's writing"), ("20 TERMs", "a step")}
    pairs = [(signal, phase) for phase in PHASES for signal in SIGNALS]
    return [pytest.param(*pair, id="-".join(pair), marks=[] if pair in fast else SLOW) for pair in pairs]


@pytest.mark.parametrize(("signal", "phase"), cases())
def test_a_signal_to_all_ranks(new_job, recovery, signal: str, phase: str) -> None:  # type: ignore[no-untyped-def]
    job, (point, match, after) = new_job(2), PHASES[phase]
    start = job.start(
        {"point": point, "match": match, "after": after, "act": "signal all", "argument": SIGNALS[signal], "rank": 0}
    )
    assert start.codes == [0, 0] and len(start.acted) == 1, start.log
    if job.done:
        assert job.status["reason"] == "done" and phase in ("the last save", "the very end")
    else:
        assert job.status["reason"] == "signal" and job.status["step"] == job.last_step
        if job.last_step:
            assert job.checkpoints()[-1] == job.last_step  # nothing is lost
    reached = job.last_step
    was_done = job.done
    again = recovery.finish(job, f"{signal} during {phase}")
    assert was_done or again.resumed_at == reached


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all(new_job, recovery, rank: int) -> None:  # type: ignore[no-untyped-def]
    job = new_job(2, "parallel.tensor=2")
    start = job.start({"point": "step", "match": "^9$", "act": "signal", "argument": "SIGUSR1", "rank": rank})
    assert start.codes == [0, 0] and job.status["reason"] == "signal" and job.last_step == 9
    again = recovery.finish(job, f"USR1 to rank {rank} alone, tp 2", "parallel.tensor=2")
    assert again.resumed_at == 9


@pytest.mark.slow
@pytest.mark.fault
def test_before_python_listens_the_stop_file_covers(new_job, recovery) -> None:  # type: ignore[no-untyped-def]
    """A signal then ends the ranks; the launch script's file makes their next start stop in order."""
    job = new_job(2)
    stop = job.folder / "STOP"
    fault = {"point": "arguments", "act": "signal", "argument": "SIGUSR1"}
    early = job.start(fault, extra=["--stop-file", str(stop)])
    # The first that it ends makes the launcher end (TERM) the other, if that is not quicker.
    assert -10 in early.codes and set(early.codes) <= {-10, -15} and not job.run_dir.exists()
    stop.touch()
    start = job.start(extra=["--stop-file", str(stop)])
    assert start.codes == [0, 0] and job.status["reason"] == "signal" and job.last_step == 0
    stop.unlink()
    job.starts.append(early)  # whose detection is reported
    recovery.finish(job, "USR1 before Python listens")


@pytest.mark.slow
@pytest.mark.fault
def test_a_stop_file_of_the_job_is_a_signal(new_job, recovery) -> None:  # type: ignore[no-untyped-def]
    job = new_job(2)
    stop = job.folder / "STOP"
    fault = {"point": "step", "match": "^9$", "act": "touch", "argument": str(stop), "rank": 1}
    start = job.start(fault, extra=["--stop-file", str(stop)])
    assert start.codes == [0, 0] and job.status["reason"] == "signal" and job.last_step == 9
    recovery.finish(job, "--stop-file appears in step 9")


@pytest.mark.slow
@pytest.mark.fault
def test_a_persons_stop_holds_until_it_is_removed(new_job, recovery) -> None:  # type: ignore[no-untyped-def]
    job = new_job(2)
    stop = job.run_dir / "STOP"
    start = job.start({"point": "step", "match": "^9$", "act": "touch", "argument": str(stop), "rank": 0})
    assert start.codes == [0, 0] and job.status["reason"] == "stop_file" and job.last_step == 9
    again = job.start()
    assert again.codes == [0, 0] and job.last_step == 9 and f"to go on, remove {stop}" in again.log
    assert job.status["reason"] == "stop_file"  # what a launch script reads
    stop.unlink()
    job.starts.append(start)
    recovery.finish(job, "RUN/STOP appears in step 9")

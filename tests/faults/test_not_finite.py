"""NaN gradients: one step is skipped, several are rolled back and passed over, and no end is a stop."""

import json
import math

import pytest

SLOW = [pytest.mark.slow, pytest.mark.fault]


def poisoned(passes: list[int] | None, rank: int = 1) -> dict:  # type: ignore[type-arg]
    """One rank's gradient is NaN in these backward passes: one a step, counted from the start."""
    return {"point": "model", "act": "nan", "argument": passes, "rank": rank}


def difference_from(job, undisturbed) -> float:  # type: ignore[no-untyped-def]
    """Of the last losses; a skipped step changes the numbers, but not what the model has learnt by much."""
    got, want = (j.records("loss")[-1]["loss"] for j in (job, undisturbed(2)))
    assert math.isclose(got, want, rel_tol=0.05)
    return got - want


def test_one_step_is_skipped_by_all_ranks(new_job, recovery, undisturbed) -> None:  # type: ignore[no-untyped-def]
    job = new_job(2)
    start = job.start(poisoned([5]))
    assert start.codes == [0, 0] and job.done, start.log
    assert [r["step"] for r in job.records("skipped") if "loss" in r] == [5]
    progress = job.manifest()["progress"]
    assert (progress["step"], progress["optimizer_steps"]) == (24, 23)
    # Up to it, and in its own forward, nothing differs; after it, the same parameters meet the next batch.
    got, want = (j.curve()["loss"] for j in (job, undisturbed(2)))
    assert all(got[step] == want[step] for step in range(1, 5)) and got[5][1] == want[5][1]
    recovery.add("NaN gradient in step 5: skipped", None, 5, 1, difference_from(job, undisturbed))


@pytest.mark.slow
@pytest.mark.fault
def test_a_skip_survives_a_crash(new_job) -> None:  # type: ignore[no-untyped-def]
    whole, cut = new_job(2), new_job(2)
    whole.start(poisoned([5]))
    cut.start(poisoned([5], rank=0), {"point": "step", "match": "^10$", "act": "kill all", "rank": 1})
    assert cut.start().resumed_at == 6
    assert whole.done and cut.done and cut.curve() == whole.curve()


@pytest.mark.slow
@pytest.mark.fault
def test_several_in_a_row_are_rolled_back(new_job, recovery, undisturbed) -> None:  # type: ignore[no-untyped-def]
    """Steps 8 to 10 are bad once; back to the checkpoint of step 6, they are passed over."""
    job = new_job(2, "recovery.max_skips=3")
    start = job.start(poisoned([8, 9, 10]))
    assert start.codes == [0, 0] and job.done, start.log
    [rollback] = json.loads((job.run_dir / "rollbacks.json").read_text())
    assert (rollback["to_step"], rollback["first"], rollback["last"]) == (6, 8, 10)
    progress = job.manifest()["progress"]
    assert (progress["step"], progress["optimizer_steps"], progress["consumed_tokens"]) == (24, 21, 24 * 64)
    got, want = (j.curve()["loss"] for j in (job, undisturbed(2)))
    assert list(got) == list(range(1, 25)) and all(got[step] == want[step] for step in range(1, 8))
    recovery.add("NaN gradients in steps 8 to 10: rolled back", None, 6, 3, difference_from(job, undisturbed))


@pytest.mark.slow
@pytest.mark.fault
def test_a_crash_after_a_roll_back_passes_over_the_same_steps(new_job) -> None:  # type: ignore[no-untyped-def]
    whole, cut = (new_job(2, "recovery.max_skips=3") for _ in range(2))
    whole.start(poisoned([8, 9, 10]))
    # Step 7 comes before the roll-back and after it.
    cut.start(poisoned([8, 9, 10]), {"point": "step", "match": "^11$", "act": "kill all", "rank": 0})
    assert cut.start().resumed_at == 6
    assert whole.done and cut.done and cut.curve() == whole.curve()


@pytest.mark.slow
@pytest.mark.fault
def test_without_end_is_a_stop(new_job) -> None:  # type: ignore[no-untyped-def]
    job = new_job(2, "recovery.max_skips=2", "recovery.max_rollbacks=2")
    start = job.start(poisoned(None))
    assert start.codes == [1, 1]
    assert job.status["reason"] == "not_finite" and "after 2 roll-backs" in job.status["detail"], job.status
    assert len(json.loads((job.run_dir / "rollbacks.json").read_text())) == 2
    assert not job.done and all(math.isfinite(r["loss"]) for r in job.records("loss") if r["loss"] is not None)
    state = job.final_state()
    assert all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point())

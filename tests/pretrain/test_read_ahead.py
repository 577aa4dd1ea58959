"""Batches read in a thread: for the right step, wherever a run goes, with their errors."""

import threading

import pytest

from pretrain.read_ahead import ReadAhead


class Reads:
    """Which steps were read, by which thread; those in `bad` fail."""

    def __init__(self, *bad: int) -> None:
        self.steps: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.began = threading.Condition()
        self.bad = bad

    def __call__(self, step: int) -> str:
        with self.began:
            self.steps.append(step)
            self.threads.add(threading.current_thread())
            self.began.notify_all()
        if step in self.bad:
            raise RuntimeError(f"step {step} can't be read")
        return f"batch {step}"

    def wait_for(self, step: int) -> None:
        with self.began:
            assert self.began.wait_for(lambda: step in self.steps, 60)


def test_the_next_step_is_read_before_it_is_asked_for_and_none_past_the_end() -> None:
    reads = Reads()
    with ReadAhead(reads, 3) as ahead:
        assert ahead(0) == "batch 0"
        reads.wait_for(1)
        assert [ahead(1), ahead(2)] == ["batch 1", "batch 2"]
    assert reads.steps == [0, 1, 2]
    assert len(reads.threads) == 1 and threading.main_thread() not in reads.threads
    assert not any(thread.is_alive() for thread in reads.threads)


def test_a_run_may_go_back_and_pass_over_steps() -> None:
    with ReadAhead(Reads(), 100) as ahead:
        assert [ahead(step) for step in (5, 6, 2, 3, 9, 9, 10)] == [f"batch {n}" for n in (5, 6, 2, 3, 9, 9, 10)]


def test_an_error_reaches_the_step_that_it_is_about_and_no_other() -> None:
    reads = Reads(3, 7)
    with ReadAhead(reads, 100) as ahead:
        assert ahead(2) == "batch 2"
        reads.wait_for(3)
        with pytest.raises(RuntimeError, match="step 3 can't be read"):
            ahead(3)
        assert ahead(6) == "batch 6"
        reads.wait_for(7)
        assert ahead(8) == "batch 8"  # 7 was passed over


def test_the_wait_is_measured() -> None:
    release = threading.Event()
    threading.Timer(0.05, release.set).start()

    with ReadAhead(lambda step: release.wait(60), 1) as ahead:
        assert ahead(0)
        assert ahead.waited_seconds > 0.01

"""A checkpoint of any topology, resumed by any other, in the same command: the loss curve goes on.

Every topology trains 30 steps undisturbed, and goes on for 20 steps from every one's checkpoint of step 10. Sums over
other ranks round differently: fp32 losses may differ by 1e-5 of themselves, on the same topology by nothing.
"""

import itertools
import shutil
from dataclasses import dataclass

import pytest

SLOW = [pytest.mark.slow, pytest.mark.fault]
SAVED, STEPS = 10, 30


@dataclass(frozen=True)
class Topology:
    tensor: int
    data: int
    zero: int
    batch: int = 8

    def __str__(self) -> str:
        return f"tp{self.tensor}dp{self.data}z{self.zero}"

    @property
    def world(self) -> int:
        return self.tensor * self.data

    @property
    def overrides(self) -> tuple[str, ...]:
        settings = {
            "parallel.tensor": self.tensor,
            "parallel.zero_stage": self.zero,
            "train.global_batch_size": self.batch,
            "train.micro_batch_size": 2 if self.batch == 8 else 1,
            "train.total_tokens": STEPS * self.batch * 16,
            "model.n_layer": 2,
            "checkpoint.interval": SAVED,
            "checkpoint.keep_last": 9,
            "eval.interval": 0,
        }
        return tuple(f"{key}={value}" for key, value in settings.items())


ALL = [Topology(tensor, data, zero) for tensor, data, zero in itertools.product((1, 2), (1, 2), (1, 2, 3))]
TP1DP1Z1, TP1DP2Z3, TP2DP1Z1, TP2DP1Z3 = (Topology(*place) for place in ((1, 1, 1), (1, 2, 3), (2, 1, 1), (2, 1, 3)))
FAST = {
    (TP2DP1Z1, TP1DP1Z1),
    (TP1DP1Z1, TP2DP1Z3),
    (TP1DP2Z3, TP1DP1Z1),
    (TP1DP2Z3, TP2DP1Z1),
    (TP2DP1Z3, TP1DP2Z3),
    (TP2DP1Z3, TP2DP1Z3),
}
# A node is lost, or one more is found; 12 sequences divide by 4 and by 3.
DP4, DP3 = ([Topology(1, data, zero, batch=12) for zero in (1, 3)] for data in (4, 3))
RESIZED = [*itertools.product(DP4, DP3), *itertools.product(DP3, DP4)]


def pairs(chosen) -> list:  # type: ignore[no-untyped-def, type-arg]
    return [pytest.param(*p, id=f"{p[0]}-{p[1]}", marks=[] if p in FAST else SLOW) for p in chosen]


def resume(new_job, undisturbed, source: Topology, target: Topology) -> tuple[float, int]:  # type: ignore[no-untyped-def]
    """The largest relative difference of the losses after the checkpoint, and how many there are."""
    want = undisturbed(source.world, *source.overrides)
    job = new_job(target.world, *target.overrides)
    folder = f"checkpoints/step_{SAVED:08d}"
    shutil.copytree(want.run_dir / folder, job.run_dir / folder)
    start = job.start()
    assert set(start.codes) == {0} and start.resumed_at == SAVED, start.log
    got, expected = ([r["loss"] for r in j.records("loss")] for j in (job, want))
    differences = [abs(a - b) / b for a, b in zip(got, expected[SAVED:], strict=True)]
    return max(differences), len(differences)


@pytest.fixture(scope="module")
def matrix(table):  # type: ignore[no-untyped-def]
    """Writes a pair's difference into the table of all pairs."""
    cells: dict[tuple[Topology, Topology], str] = {}
    yield cells.__setitem__
    if not all(pair in cells for pair in itertools.product(ALL, ALL)):
        rows = table("Resharding: largest relative difference of 20 losses", "saved by", "resumed by", "difference")
        for (source, target), cell in cells.items():
            rows.add_row(str(source), str(target), cell)
        return
    title = "Resharding, saved by (row) → resumed by (column): largest relative difference of 20 losses"
    rows = table(title, "", *map(str, ALL))
    for source in ALL:
        rows.add_row(str(source), *(cells[source, target] for target in ALL))


@pytest.mark.parametrize(("source", "target"), pairs(itertools.product(ALL, ALL)))
def test_every_topology_resumes_every_other(new_job, undisturbed, matrix, source, target) -> None:  # type: ignore[no-untyped-def]
    difference, steps = resume(new_job, undisturbed, source, target)
    matrix((source, target), "0" if difference == 0 else f"{difference:.0e}")
    assert steps == STEPS - SAVED
    assert difference <= (0 if source == target else 1e-5)


@pytest.mark.parametrize(("source", "target"), pairs(RESIZED))
def test_four_ranks_become_three(new_job, undisturbed, table, source, target) -> None:  # type: ignore[no-untyped-def]
    difference, steps = resume(new_job, undisturbed, source, target)
    rows = table("Resharding, a global batch of 12 sequences", "saved by", "resumed by", "largest relative difference")
    rows.add_row(str(source), str(target), f"{difference:.0e}")
    assert steps == STEPS - SAVED and difference <= 1e-5

"""kill -9 at any moment, also inside a save: the run goes on from its last whole checkpoint, bit for bit the same."""

import random
import re

import pytest

DP2, TP2 = (), ("parallel.tensor=2",)
SLOW = [pytest.mark.slow, pytest.mark.fault]


def moments(seed: int, count: int) -> list[tuple[str, int, float]]:
    """(point, step, milliseconds after it began): half of them within steps, half within saves."""
    draw = random.Random(seed)
    steps = [("step", draw.randint(1, 24), draw.uniform(0, 50)) for _ in range(count // 2)]
    return steps + [("tensors", draw.choice((6, 12, 18, 24)), draw.uniform(0, 25)) for _ in range(count // 2)]


def random_cases() -> list:  # type: ignore[type-arg]
    """20 moments of one rank's end and 20 of all ranks', on both meshes in turn; two of them fast."""
    cases = []
    for victims, seed in (("kill", 4), ("kill all", 5)):
        for i, moment in enumerate(moments(seed, 20)):
            mesh, fast = (DP2, TP2)[i % 2], i == 19
            name = f"{victims}-{'tp2' if i % 2 else 'dp2'}-{moment[0]}{moment[1]}+{moment[2]:.1f}ms"
            cases.append(pytest.param(victims, *moment, mesh, id=name, marks=[] if fast else SLOW))
    return cases


@pytest.mark.parametrize(("victims", "point", "step", "milliseconds", "mesh"), random_cases())
def test_at_a_random_moment(new_job, recovery, victims, point, step, milliseconds, mesh) -> None:  # type: ignore[no-untyped-def]
    job = new_job(2, *mesh)
    match = f"^{step}$" if point == "step" else f"step_{step:08d}/"
    start = job.start({"point": point, "match": match, "after": milliseconds / 1e3, "act": victims, "rank": 1})
    assert -9 in start.codes or job.done  # a kill in the last steps may come when all is done
    where = {"step": "step", "tensors": "save at step"}[point]
    recovery.finish(job, f"{victims} {milliseconds:.0f} ms into {where} {step}, {'tp 2' if mesh else 'dp 2'}", *mesh)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("step", [3, 12, 20])
def test_a_single_process(new_job, recovery, step) -> None:  # type: ignore[no-untyped-def]
    job = new_job(1)
    job.start({"point": "step", "match": f"^{step}$", "after": 0.002, "act": "kill"})
    recovery.finish(job, f"kill in step {step}, one process")


# Every call that puts something on disk in the save at step 18, in order: (rank, point, what about, which such call).
PARTIAL = r"\.partial_step_00000018"
SAVE = [
    *((rank, "tensors", f"{PARTIAL}/rank_0000{rank}", 1) for rank in (0, 1)),
    *((rank, "fsync", f"{PARTIAL}/rank_0000{rank}", 1) for rank in (0, 1)),
    (0, "bytes", f"{PARTIAL}/manifest.json.tmp", 1),
    (0, "fsync", f"{PARTIAL}/manifest.json.tmp", 1),
    (0, "replace", f"{PARTIAL}/manifest.json$", 1),
    (0, "fsync", f"{PARTIAL}$", 1),
    (0, "bytes", f"{PARTIAL}/manifest.sha256.tmp", 1),
    (0, "fsync", f"{PARTIAL}/manifest.sha256.tmp", 1),
    (0, "replace", f"{PARTIAL}/manifest.sha256$", 1),
    (0, "fsync", f"{PARTIAL}$", 3),
    (0, "rename", "/step_00000018$", 1),
    (0, "fsync", "/checkpoints$", 4),
    (0, "bytes", "/latest.tmp", 4),
    (0, "fsync", "/latest.tmp", 4),
    (0, "replace", "/latest$", 4),
    (0, "fsync", "/run$", 6),
    (0, "rename", r"\.removed_step_00000000$", 1),
]


@pytest.mark.parametrize(
    ("rank", "point", "match", "nth"),
    [pytest.param(*c, marks=[] if c[1:3] == ("rename", "/step_00000018$") else SLOW) for c in SAVE],
)
def test_inside_a_save(new_job, recovery, rank, point, match, nth) -> None:  # type: ignore[no-untyped-def]
    """Before each call; where it writes a file, with half of it written."""
    act = "kill all, half written" if point in ("tensors", "bytes") else "kill all"
    job = new_job(2)
    start = job.start({"point": point, "match": match, "nth": nth, "act": act, "rank": rank})
    assert start.codes == [-9, -9] and len(start.acted) == 1
    what = re.sub(r"[\\$]", "", match).lstrip("/")
    recovery.finish(job, f"{act} at the {point} of {what}")


@pytest.mark.slow
@pytest.mark.fault
def test_no_call_of_a_save_is_left_out(new_job) -> None:  # type: ignore[no-untyped-def]
    job = new_job(2)
    points = ("tensors", "bytes", "fsync", "replace", "rename")
    start = job.start(*({"point": point, "nth": 0, "act": "note"} for point in points))
    calls = [(c["rank"], c["point"], c["about"]) for c in start.acted]
    first = next(i for i, (_, _, about) in enumerate(calls) if "partial_step_00000018" in about)
    last = next(i for i, (_, _, about) in enumerate(calls) if "partial_step_00000024" in about)
    for rank, point, about in calls[first:last]:
        assert any((r, p) == (rank, point) and re.search(match, about) for r, p, match, _ in SAVE), (rank, point, about)

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools.corpus import open_corpus
from data_tools.dataset import DatasetManifest, open_dataset
from data_tools.documents import open_documents
from data_tools.places import keys
from data_tools.selection import Request
from data_tools.shards import ShardError
from data_tools.subset import Outcome, file_name, main, make_subset
from data_tools.subset_plan import DEFAULT_SIZES, Plan, Sizes
from data_tools.tokenize import WHOLE, make_task, tokenize
from data_tools.tokenize import Plan as Tokenizing

ROOT = Path(__file__).parents[2]
SPOKEN, WRITTEN, OTHER = "StateOfTheUnionSpoken", "StateOfTheUnionWritten", "A/other set"
REQUEST = Request(30_000, 1, {}, 5_000)


@dataclass(frozen=True)
class Layouts:
    """The same documents in three layouts, and some of them again as a corpus to exclude."""

    one: str  # a merged shard of one file
    parts: str  # parts of three files, other names and order
    halves: tuple[str, str]  # two merged shards
    validation: str


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, records: list[dict], tokenizer_file: Path) -> Layouts:
    folder = tmp_path_factory.mktemp("layouts")
    paragraphs = [(p, r["meta"]["redpajama_set_name"]) for r in records for p in r["text"].split("\n") if p.strip()]
    documents = [(p, OTHER if i % 9 == 0 else name) for i, (p, name) in enumerate(paragraphs)]
    documents += documents[:12]  # duplicates in the same source,
    documents += [(p, WRITTEN) for p, name in documents[40:50]]  # and in others

    def write(name: str, part: list[tuple[str, str]]) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps({"text": text, "meta": {"redpajama_set_name": of}}) for text, of in part]
        path.write_text("\n".join(lines) + "\n")
        return path

    def corpus(name: str, part: list[tuple[str, str]]) -> str:
        tokenize([str(write(f"{name}.jsonl", part))], str(tokenizer_file), folder / name, workers=1)
        return str(folder / name)

    mixed = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
    for number, part in enumerate((mixed[:50], mixed[50:51], mixed[51:])):
        write(f"parts/{number}.jsonl", part)
    parts = Tokenizing.of([f"{folder}/parts/*"], str(tokenizer_file), folder / "parts-of-three")
    make_task(parts, WHOLE, workers=1)
    return Layouts(
        corpus("one", documents),
        parts.prefix,
        (corpus("left", mixed[200:]), corpus("right", mixed[:200])),
        corpus("validation", [(text, "held out") for text, _ in documents[100:106]]),
    )


@pytest.fixture
def make(tmp_path: Path, layouts: Layouts) -> Callable[..., Outcome]:
    """Makes the dataset ``tmp_path/NAME``."""

    def make(
        name: str,
        inputs: tuple[str, ...] = (layouts.one,),
        request: Request = REQUEST,
        workers: int = 1,
        sizes: Sizes = DEFAULT_SIZES,
        overwrite: bool = False,
    ) -> Outcome:
        plan = Plan.of(inputs, [layouts.validation], request, tmp_path / name)
        return make_subset(plan, workers, overwrite, sizes)

    return make


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset but the one that names the inputs."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "report.json"}


def shard_documents(folder: Path) -> dict[str, list[list[int]]]:
    """Each source's documents in the order of its shards."""
    return {
        source.name: [
            document.tolist() for shard in source.shards for document in IndexedDataset(str(shard.bin.with_suffix("")))
        ]
        for source in open_dataset(folder).sources
    }


def input_documents(prefix: str) -> dict[tuple[int, int], list[int]]:
    """Tokens by hash, of a merged shard."""
    (piece,) = open_corpus(prefix).pieces
    rows, tokens = open_documents(piece.documents), np.fromfile(piece.bin, "<u2")
    texts = np.split(tokens, np.cumsum(rows["tokens"])[:-1])
    hashes = zip(rows["hash_high"].tolist(), rows["hash_low"].tolist(), strict=True)
    return dict(zip(hashes, [text.tolist() for text in texts], strict=True))


def test_the_bytes_do_not_depend_on_layout_workers_and_sizes(tmp_path, make, layouts):
    made = [
        make("one"),
        make("parts", (layouts.parts,), workers=2, sizes=Sizes(100, 60, 3_000)),
        make("halves", layouts.halves, sizes=Sizes(40, 1000, 500)),
        make("turned", layouts.halves[::-1], workers=2),
    ]

    expected = content(tmp_path / "one")
    assert len(expected) == 2 + 2 * 6
    for name in ("parts", "halves", "turned"):
        assert content(tmp_path / name) == expected
    assert len({outcome.report.digest for outcome in made}) == 1
    assert made[0].report.digest == DatasetManifest.read(tmp_path / "one" / "dataset.json").digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["halves", "one", "parts", "turned"]


def test_each_document_is_there_once_in_the_order_of_the_keys(tmp_path, make, layouts):
    report = make("all", request=Request(None, 5, {}, 4_000), sizes=Sizes(50, 50, 2_000)).report

    tokens, left_out = input_documents(layouts.one), input_documents(layouts.validation)
    assert len(left_out) == 6 and left_out.keys() < tokens.keys()
    kept = {place: text for place, text in tokens.items() if place not in left_out}
    key = dict(zip(kept, keys(np.array([high for high, _ in kept], np.uint64), 5).tolist(), strict=True))
    in_order = [kept[place] for place in sorted(kept, key=lambda place: (key[place], place[1]))]
    found = shard_documents(tmp_path / "all")
    assert sorted(found) == [OTHER, SPOKEN, WRITTEN]
    assert Counter(map(tuple, in_order)) == Counter(tuple(text) for texts in found.values() for text in texts)
    for texts in found.values():
        positions = iter(in_order)
        assert all(text in positions for text in texts)  # a subsequence
    assert report.taken.documents == len(kept) and report.taken.tokens == sum(map(len, kept.values()))
    rows = open_documents(Path(f"{layouts.one}.documents.npy"))
    overlap = sum(pair in left_out for pair in zip(rows["hash_high"].tolist(), rows["hash_low"].tolist(), strict=True))
    assert sum(source.overlap.documents for source in report.sources) == overlap == 6
    assert sum(source.duplicates.documents for source in report.sources) == len(rows) - len(kept) - overlap >= 22


def test_a_smaller_subset_is_the_start_of_each_source_of_a_larger_one(tmp_path, make):
    make("small", request=Request(9_000, 1, {}, 5_000))
    make("large", request=Request(40_000, 1, {}, 3_000))
    make("other", request=Request(9_000, 2, {}, 5_000))

    small, large, other = (shard_documents(tmp_path / name) for name in ("small", "large", "other"))
    for name, documents in small.items():
        assert documents == large[name][: len(documents)]
        assert documents != other[name]


def test_the_shares_are_kept_or_given(tmp_path, make):
    proportions = {SPOKEN: 0.9, WRITTEN: 0.1}
    kept, given = make("kept").report, make("given", request=Request(9_000, 1, proportions, 5_000)).report

    available = sum(source.unique.tokens for source in kept.sources)
    longest = 2_000
    for source in kept.sources:
        assert source.share == source.unique.tokens / available
        assert 0 <= source.taken.tokens - 30_000 * source.share < longest
    assert [source.quota for source in given.sources] == [0, 8_100, 900]
    assert all(0 <= source.taken.tokens - source.quota < longest for source in given.sources)
    dataset = open_dataset(tmp_path / "given")
    assert [source.name for source in dataset.sources] == [SPOKEN, WRITTEN]
    assert dataset.tokens == given.taken.tokens
    rule = DatasetManifest.read(tmp_path / "given" / "dataset.json").rule
    assert (rule.tokens, rule.seed, rule.shares) == (9_000, 1, {OTHER: 0.0, **proportions})


def test_the_report_names_where_documents_that_were_left_out_are(make, layouts):
    report = make("one", (layouts.parts,)).report

    assert len(report.duplicates) == 20 and len(report.overlap) == 6
    for example in (*report.duplicates, *report.overlap):
        texts = []
        for place in (example.dropped, example.equals):
            if place.file.endswith(".bin"):
                assert place.file == f"{layouts.validation}.bin"
                place_file = Path(f"{layouts.validation}.jsonl")
            else:
                place_file = Path(place.file)
            assert place.document == place.line - 1
            texts.append(json.loads(place_file.read_text().splitlines()[place.line - 1])["text"])
        assert texts[0] == texts[1]


def test_a_finished_dataset_is_found_and_another_is_not_replaced_unasked(tmp_path, make, layouts):
    assert make("one").made
    before = content(tmp_path / "one")

    assert not make("one", workers=2, sizes=Sizes(10, 10, 10)).made
    for options, message in (
        ({"request": Request(20_000, 1, {}, 5_000)}, "--tokens 30000 there, 20000 now; --overwrite"),
        ({"request": Request(30_000, 0, {}, 5_000)}, "--seed 1 there, 0 now"),
        ({"inputs": (layouts.parts,)}, f"--input {layouts.one} there"),
    ):
        with pytest.raises(ShardError, match=message):
            make("one", **options)
    assert content(tmp_path / "one") == before

    assert make("one", request=Request(20_000, 1, {}, 5_000), overwrite=True).made
    assert content(tmp_path / "one") != before
    next((tmp_path / "one").glob("*.bin")).unlink()
    with pytest.raises(ShardError, match="bin is missing"):
        make("one", request=Request(20_000, 1, {}, 5_000))
    assert make("one", overwrite=True).made
    assert content(tmp_path / "one") == before


def test_a_folder_that_is_no_dataset_is_never_replaced(tmp_path, make):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "thesis.tex").write_text("x")

    with pytest.raises(ShardError, match=r"is no dataset \(no dataset.json\); name another folder"):
        make("one", overwrite=True)

    assert os.listdir(tmp_path / "one") == ["thesis.tex"]


def command(layouts: Layouts, output: Path, *options: str) -> list[str]:
    arguments = ["--input", layouts.one, "--exclude", layouts.validation, "--output", str(output), "--workers", "1"]
    return [*arguments, "--seed", "1", "--shard-tokens", "5e3", *options]


def test_a_dry_run_prints_the_choice_and_leaves_nothing(tmp_path, layouts, capsys):
    assert main(command(layouts, tmp_path / "out", "--tokens", "3e4", "--dry-run")) == 0

    output = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "GB are free" in output
    assert main(command(layouts, tmp_path / "out", "--tokens", "3e4")) == 0
    assert output.splitlines()[:5] == capsys.readouterr().out.splitlines()[:5]
    assert DatasetManifest.read(tmp_path / "out" / "dataset.json").digest in output
    assert main(command(layouts, tmp_path / "out", "--tokens", "3e4")) == 0
    assert "already complete; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "1e9"), "--tokens 1,000,000,000: there are"),
        (("--tokens", "100", "--proportions", f"{SPOKEN}=1", "x=0"), f"no source 'x'; there are {OTHER}, {SPOKEN}"),
        (("--tokens", "100", "--proportions", f"{SPOKEN}=0.5"), "add up to 0.5, not to 1"),
        (("--tokens", "60000", "--proportions", f"{SPOKEN}=1"), "too few tokens in unique documents"),
        (("--tokens", "1", "--proportions", f"{SPOKEN}=0.5", f"{OTHER}=0.5"), "no source's share of it is a token"),
    ],
)
def test_a_choice_that_can_not_be_made_is_refused_and_leaves_nothing(tmp_path, layouts, capsys, options, message):
    assert main(command(layouts, tmp_path / "out", *options)) == 1

    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "1.5"), "'1.5': write a whole number from 1 on, like 100e9"),
        (("--tokens", "many"), "write a whole number"),
        (("--tokens", "nan"), "write a whole number"),
        (("--tokens", "inf"), "write a whole number"),
        (("--tokens", "1e999999"), "write a whole number"),
        (("--tokens", "9", "--seed", "-1"), "write a whole number from 0 to 2^64"),
        (("--tokens", "9", "--proportions", "a"), "write SOURCE=SHARE"),
        (("--tokens", "9", "--proportions", "a=0.5", "a=0.5"), "a source is given twice"),
        (("--tokens", "9", "--workers", "0"), "must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, layouts, capsys, options, message):
    with pytest.raises(SystemExit):
        main(command(layouts, tmp_path / "out", *options))

    assert message in capsys.readouterr().err


def test_corpora_that_do_not_fit_together_are_refused(tmp_path, layouts, tokenizer_file, shard):
    with pytest.raises(ShardError, match="made with another tokenizer"):
        Plan.of([layouts.one, shard.prefix], [], REQUEST, tmp_path / "out")
    with pytest.raises(ShardError, match="is given twice"):
        Plan.of([layouts.one, layouts.one], [], REQUEST, tmp_path / "out")
    with pytest.raises(ShardError, match="nothing-there"):
        Plan.of([f"{tmp_path}/nothing-there"], [], REQUEST, tmp_path / "out")


def test_source_names_make_safe_and_different_file_names():
    assert file_name("RedPajamaC4") == "RedPajamaC4"
    names = ["a/b", "a_b", "a:b", "..", ".", "", "x" * 300, "x" * 299]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(name[0] not in "." and "/" not in name and len(name) < 100 for name in made)


LIMITED = """
import resource, sys
from data_tools.subset import main
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_named_and_the_next_run_goes_on(tmp_path, layouts, make):
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    arguments = command(layouts, tmp_path / "out", "--tokens", "all")

    run = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert run.returncode == 1
    assert "error: [Errno 27] File too large:" in run.stderr and "out.work/run-000000" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "out.work" / "selection.json").exists()
    assert not list((tmp_path / "out.work").rglob("*.tmp*"))
    selected = (tmp_path / "out.work" / "selection.json").stat().st_mtime_ns
    with pytest.raises(ShardError, match="left by an unfinished run: --tokens all there, 30000 now; --overwrite"):
        make("out")
    assert (tmp_path / "out.work" / "selection.json").stat().st_mtime_ns == selected
    assert main(arguments) == 0
    make("whole", request=Request(None, 1, {}, 5_000))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


IN_SMALL_STEPS = """
import sys
from pathlib import Path
from data_tools.selection import Request
from data_tools.subset import make_subset
from data_tools.subset_plan import Plan, Sizes
if __name__ == "__main__":
    plan = Plan.of([sys.argv[1]], [sys.argv[2]], Request(None, 1, {}, 2_000), Path(sys.argv[3]))
    make_subset(plan, 2, sizes=Sizes(10, 10, 500))
"""


@pytest.mark.slow
def test_killed_at_any_stage_it_goes_on_and_ends_in_the_same_bytes(tmp_path, layouts, make):
    script, work = tmp_path / "steps.py", tmp_path / "out.work"
    script.write_text(IN_SMALL_STEPS)
    arguments = [sys.executable, str(script), layouts.one, layouts.validation, str(tmp_path / "out")]
    kept: dict[Path, int] = {}
    stages = (
        "group-*",
        "bucket-*.unique",
        "selection.json",
        "run-*.done",
        "run-000020.done",
        "*-of-*.json",
        "*-00009-*.json",
    )
    for pattern in stages:
        process = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
        try:
            while not list(work.glob(pattern)):
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(timeout=0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (tmp_path / "out").exists()
        # What was finished before is not done again.
        assert kept.items() <= (kept := finished(work)).items()
    assert len(kept) > 30

    make("out", request=Request(None, 1, {}, 2_000), sizes=Sizes(10, 10, 500))
    make("whole", request=Request(None, 1, {}, 2_000))

    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not work.exists()


def finished(work: Path) -> dict[Path, int]:
    """When the markers of what is finished were written."""
    patterns = ("selection.json", "run-*.done", "*-of-*.json")
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in work.glob(pattern)}


def test_the_same_corpora_by_other_paths_are_the_same(tmp_path, make, layouts, monkeypatch):
    assert make("out").made

    monkeypatch.chdir(Path(layouts.one).parent)

    assert not make("out", (Path(layouts.one).name,)).made

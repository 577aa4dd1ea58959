import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

import data_tools.tokenize
from data_tools.corpus import open_corpus
from data_tools.documents import open_documents, text_hash
from data_tools.parts import BadInput
from data_tools.readers import read_documents
from data_tools.shards import Counts, Manifest, ShardError, open_shard, verify_shard
from data_tools.tokenize import Plan, Task, main, make_shard, make_task, tokenize
from data_tools.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
ENDS = ("bin", "idx", "documents.npy", "manifest.json", "tokenizer.model")


@pytest.fixture
def run(tmp_path: Path, tokenizer_file: Path) -> Callable:
    """Tokenizes ``input/*`` into the prefix ``tmp_path/NAME``."""

    def run(name: str = "out", workers: int = 1, bad_dir: Path | None = None, overwrite: bool = False):
        plan = Plan.of([f"{tmp_path}/input/*"], str(tokenizer_file), f"{tmp_path}/{name}", bad_dir)
        return make_shard(plan, workers, overwrite)

    return run


def files_of(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{end}").read_bytes() for end in ENDS]


def append_line(path: Path, line: str) -> None:
    content = zstandard.decompress(path.read_bytes()) + line.encode() + b"\n"
    path.write_bytes(zstandard.compress(content))


def names(paths: list[str]) -> list[str]:
    return sorted(Path(path).name for path in paths)


def test_the_shard_holds_every_document_in_order(tmp_path, run, input_folder, records, tokenizer, tokenizer_file):
    input_folder()

    manifest = run(workers=2).manifest

    dataset = open_shard(tmp_path / "out")
    documents = [dataset[index].tolist() for index in range(len(dataset))]
    assert documents == [[*tokenizer.encode(r["text"]), tokenizer.eos_id] for r in records]
    assert (manifest.documents, manifest.tokens) == (12, sum(map(len, documents)))
    assert manifest.text_bytes == sum(len(r["text"].encode()) for r in records) == 215_885
    assert manifest.dtype == "uint16"
    assert [Path(source.path).name for source in manifest.sources] == [f"{index}.jsonl.zst" for index in range(4)]
    for name in ("StateOfTheUnionSpoken", "StateOfTheUnionWritten"):
        chosen = [r["meta"]["redpajama_set_name"] == name for r in records]
        expected = Counts(
            sum(chosen),
            sum(len(d) for d, c in zip(documents, chosen, strict=True) if c),
            sum(len(r["text"].encode()) for r, c in zip(records, chosen, strict=True) if c),
        )
        assert manifest.sets[name] == expected
    assert (tmp_path / "out.tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
    assert Manifest.read(tmp_path / "out.manifest.json") == manifest
    assert verify_shard(tmp_path / "out") == []
    assert not (tmp_path / "out.parts").exists()


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, run, input_folder):
    input_folder()

    run("one", workers=1)
    run("two", workers=2)

    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_empty_documents_are_left_out_and_counted(run, input_folder):
    folder = input_folder()
    append_line(folder / "1.jsonl.zst", '{"text": ""}')

    manifest = run().manifest

    assert (manifest.documents, manifest.empty_documents) == (12, 1)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_started_again_it_redoes_only_unfinished_files(tmp_path, run, input_folder, tokenizer_file, stop):
    folder = input_folder(repeat=8)
    parts = tmp_path / "out.parts"
    command = [sys.executable, "-m", "data_tools.tokenize", "--workers", "1"]
    command += ["--input", f"{folder}/*", "--tokenizer", str(tokenizer_file)]
    process = subprocess.Popen([*command, "--output", f"{tmp_path}/out"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        while not list(parts.glob("*.done.json")):
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.01)
        process.send_signal(stop)
        error = process.communicate()[1]
    finally:
        process.kill()
    done = [json.loads(path.read_text())["source"]["path"] for path in parts.glob("*.done.json")]
    assert 0 < len(done) < 4
    assert not (tmp_path / "out.manifest.json").exists()
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted" in error and "Traceback" not in error

    outcome = run()

    assert names(outcome.reused) == names(done)
    assert len(outcome.tokenized) == 4 - len(done)
    run("uninterrupted")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "uninterrupted")


def test_lost_and_broken_markers_and_changed_inputs_are_redone(tmp_path, run, input_folder, monkeypatch):
    folder = input_folder()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data_tools.tokenize, "_merge", die)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not (tmp_path / "out.bin").exists()
    markers = {
        Path(json.loads(path.read_text())["source"]["path"]).name: path
        for path in (tmp_path / "out.parts").glob("*.done.json")
    }
    assert len(markers) == 4
    markers["0.jsonl.zst"].unlink()
    markers["1.jsonl.zst"].write_bytes(markers["1.jsonl.zst"].read_bytes()[:50])
    append_line(folder / "2.jsonl.zst", '{"text": "One more document."}')

    outcome = run()

    assert names(outcome.reused) == ["3.jsonl.zst"]
    assert names(outcome.tokenized) == ["0.jsonl.zst", "1.jsonl.zst", "2.jsonl.zst"]
    run("afresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "afresh")


def test_parts_of_another_tokenizer_are_redone(tmp_path, run, input_folder, corpus, monkeypatch):
    folder = input_folder()
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer([corpus], vocab_size=500))
    with monkeypatch.context() as patch:
        patch.setattr(data_tools.tokenize, "_merge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokenize([f"{folder}/*"], str(other), f"{tmp_path}/out", workers=1)

    assert run().reused == []


def test_a_finished_shard_is_left_alone(tmp_path, run, input_folder):
    input_folder()
    run()
    before = (tmp_path / "out.bin").stat()

    outcome = run()

    assert (outcome.tokenized, outcome.reused) == ([], [])
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before.st_mtime_ns


def test_a_different_shard_is_only_replaced_on_request(tmp_path, run, input_folder):
    folder = input_folder()
    run()
    before = files_of(tmp_path / "out")
    append_line(folder / "3.jsonl.zst", '{"text": "One more document."}')

    with pytest.raises(ShardError, match=r"3.jsonl.zst has other content .* --overwrite"):
        run()
    assert files_of(tmp_path / "out") == before
    assert run(overwrite=True).manifest.documents == 13
    (folder / "3.jsonl.zst").unlink()
    with pytest.raises(ShardError, match=r"made from 4 files, --input matches 3"):
        run()


def test_a_foreign_shard_is_not_overwritten(tmp_path, run, input_folder):
    input_folder()
    (tmp_path / "out.bin").write_bytes(b"somebody's tokens")

    with pytest.raises(ShardError, match=r"out.bin is there without a manifest"):
        run()
    assert (tmp_path / "out.bin").read_bytes() == b"somebody's tokens"


def test_a_second_run_beside_the_first_is_refused(tmp_path, run, input_folder):
    input_folder()
    (tmp_path / "out.parts").mkdir()
    hold = "import sys; from data_tools.lock import lock; from pathlib import Path\n"
    hold += "with lock(Path(sys.argv[1])): print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, f"{tmp_path}/out.parts/lock"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"

        with pytest.raises(ShardError, match=r"out.parts: another run is writing there"):
            run()

        other.communicate("\n")
    assert run().manifest.documents == 12


def damage(folder: Path) -> int:
    """Two bad lines and a truncated archive of 4; returns the whole documents left in the archive."""
    append_line(folder / "0.jsonl.zst", '{"text": ')
    append_line(folder / "2.jsonl.zst", '{"meta": {}}')
    whole = (folder / "3.jsonl.zst").read_bytes()
    (folder / "3.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    return len(list(read_documents(folder / "3.jsonl.zst"))) - 1


def test_unusable_records_are_counted_by_kind_and_set_aside(tmp_path, run, input_folder):
    kept = damage(input_folder())

    with pytest.raises(BadInput, match=r"input/\d.jsonl.zst:\d+: (broken JSON|no `text`|damaged archive)"):
        run()
    assert not (tmp_path / "out.manifest.json").exists()

    manifest = run(bad_dir=tmp_path / "bad").manifest

    assert manifest.documents == 9 + kept
    assert manifest.bad == {"broken JSON": 1, "damaged archive": 1, "no text": 1}
    assert len(list((tmp_path / "bad").glob("*.bad.jsonl.zst"))) == 3
    with pytest.raises(ShardError, match=r"3 unusable records \(1 broken JSON, .*\) were left out, .* --bad-dir"):
        run()


def test_the_command_names_bad_records_and_fails(tmp_path, input_folder, tokenizer_file, capsys):
    folder = input_folder()
    append_line(folder / "1.jsonl.zst", "no JSON")
    arguments = ["--input", f"{folder}/*.jsonl.zst", "--tokenizer", str(tokenizer_file)]
    arguments += ["--output", f"{tmp_path}/out", "--workers", "1"]

    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"{folder}/1.jsonl.zst:4: broken JSON" in error
    assert "--bad-dir DIR sets such records aside" in error
    assert not (tmp_path / "out.bin").exists()

    arguments += ["--bad-dir", f"{tmp_path}/bad"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "12 documents" in said
    assert f"1 unusable records (1 broken JSON) in {tmp_path}/bad" in said
    assert main(arguments) == 0
    assert "already complete" in capsys.readouterr().out


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(tmp_path, input_folder, tokenizer_file, capsys):
    folder = input_folder()
    arguments = ["--input", f"{folder}/*", "--tokenizer", str(tokenizer_file), "--output", f"{tmp_path}/out"]

    assert main([*arguments, "--dry-run"]) == 0

    assert "4 files" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["input"]


def test_tasks_make_what_one_run_makes(tmp_path, run, input_folder, tokenizer_file):
    folder = input_folder()
    plan = Plan.of([f"{folder}/*"], str(tokenizer_file), f"{tmp_path}/out")
    with pytest.raises(ShardError, match=r"neither .*out.manifest.json nor .*out.parts/inputs.json is there"):
        open_corpus(plan.prefix)

    first = make_task(plan, Task(1, 3), workers=1)
    assert names(first.tokenized) == ["1.jsonl.zst"]
    with pytest.raises(ShardError, match=r"3 of 4 parts are not finished \(.*0.jsonl.zst, "):
        open_corpus(plan.prefix)
    assert names(make_task(plan, Task(0, 3), workers=2).tokenized) == ["0.jsonl.zst", "3.jsonl.zst"]
    assert names(make_task(plan, Task(2, 3), workers=1).tokenized) == ["2.jsonl.zst"]
    assert make_task(plan, Task(2, 3), workers=1).tokenized == []
    assert make_task(plan, Task(9, 10), workers=1).total.documents == 0
    assert [Path(piece.source).name for piece in open_corpus(plan.prefix).pieces] == names(map(str, plan.files))

    merged = make_shard(plan, workers=1)

    assert (merged.tokenized, len(merged.reused)) == ([], 4)
    run("whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert open_corpus(plan.prefix).pieces[0].document_count == 12


def test_tasks_that_see_other_files_are_refused(tmp_path, input_folder, tokenizer_file):
    folder = input_folder()
    make_task(Plan.of([f"{folder}/*"], str(tokenizer_file), f"{tmp_path}/out"), Task(0, 2), workers=1)
    (folder / "3.jsonl.zst").unlink()

    with pytest.raises(ShardError, match=r"begun for other files .*\(4 files, .*; now 3, .*inputs.json"):
        make_task(Plan.of([f"{folder}/*"], str(tokenizer_file), f"{tmp_path}/out"), Task(1, 2), workers=1)


def test_the_document_table_says_what_each_document_is(tmp_path, run, input_folder, records, tokenizer):
    input_folder()
    manifest = run().manifest

    table = open_documents(tmp_path / "out.documents.npy")

    names = [list(manifest.sets)[number] for number in table["set"]]
    assert names == [record["meta"]["redpajama_set_name"] for record in records]
    for row, record in zip(table, records, strict=True):
        assert (row["hash_high"], row["hash_low"], row["text_bytes"]) == text_hash(record["text"])
        assert row["tokens"] == len(tokenizer.encode(record["text"])) + 1
    assert table["line"].tolist() == [1, 2, 3] * 4


def test_a_full_disk_is_named_and_the_next_run_goes_on(tmp_path, run, input_folder, tokenizer_file):
    folder = input_folder(files=2, repeat=4)
    command = [sys.executable, "-m", "data_tools.tokenize", "--input", f"{folder}/*", "--workers", "1"]
    command += ["--tokenizer", str(tokenizer_file), "--output", f"{tmp_path}/out"]
    # A limit on a file's size fails a write as a full disk does, without one; the second file's tokens exceed it.
    limit = (400_000, 400_000)
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )

    assert done.returncode == 1
    assert "File too large: '" in done.stderr and f"{tmp_path}/out.parts/" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out.parts").glob("*.tmp*"))
    run()
    run("afresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "afresh")


def test_the_command_names_wrong_arguments(tmp_path, corpus, tokenizer_file, capsys):
    def error(source: object, tokenizer: object) -> str:
        arguments = ["--input", str(source), "--tokenizer", str(tokenizer)]
        assert main([*arguments, "--output", f"{tmp_path}/out"]) == 1
        return capsys.readouterr().err

    assert "none*' matches no file" in error(tmp_path / "none*", tokenizer_file)
    assert "sotu_small.jsonl: not a SentencePiece model" in error(corpus, corpus)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    assert "1 files, and no document with text in them" in error(empty, tokenizer_file)
    with pytest.raises(SystemExit):
        main(["--input", "x", "--tokenizer", "y", "--output", "z", "--workers", "0"])
    assert "--workers 0: must be at least 1" in capsys.readouterr().err


def test_parts_beside_a_shard_of_other_files_are_refused_and_of_the_same_not_needed(
    tmp_path, input_folder, tokenizer_file
):
    folder = input_folder()
    prefix = f"{tmp_path}/out"
    tokenize([f"{folder}/*"], str(tokenizer_file), prefix, workers=1)
    plan = Plan.of([f"{folder}/*"], str(tokenizer_file), prefix)

    assert make_task(plan, Task(0, 2), workers=1).manifest.documents == 12

    append_line(folder / "3.jsonl.zst", '{"text": "One more document."}')
    with pytest.raises(ShardError, match=r"3.jsonl.zst has other content .* another --output"):
        make_task(Plan.of([f"{folder}/*"], str(tokenizer_file), prefix), Task(0, 2), workers=1)


def test_finished_parts_of_other_files_are_not_deleted(tmp_path, input_folder, tokenizer_file):
    folder = input_folder()
    make_task(Plan.of([f"{folder}/*"], str(tokenizer_file), f"{tmp_path}/out"), Task(0, 1), workers=1)
    narrower = Plan.of([f"{folder}/0*"], str(tokenizer_file), f"{tmp_path}/out")

    with pytest.raises(ShardError, match=r"finished parts of 3 files that --input does not match, like .*1.jsonl.zst"):
        make_shard(narrower, workers=1)
    assert len(list((tmp_path / "out.parts").glob("*.done.json"))) == 4
    assert make_shard(narrower, workers=1, overwrite=True).manifest.documents == 3


def test_records_set_aside_are_no_input(tmp_path, input_folder, tokenizer_file):
    folder = input_folder()
    (folder / "x.bad.jsonl.zst").touch()

    with pytest.raises(ValueError, match=r"x.bad.jsonl.zst, records that --bad-dir has set aside"):
        Plan.of([f"{folder}/*"], str(tokenizer_file), f"{tmp_path}/out")


def test_a_part_of_a_file_that_was_another_is_not_taken_for_the_corpus(tmp_path, input_folder, tokenizer_file):
    folder = input_folder()
    plan = Plan.of([f"{folder}/*"], str(tokenizer_file), f"{tmp_path}/out")
    make_task(plan, Task(0, 1), workers=1)
    append_line(folder / "1.jsonl.zst", '{"text": "One more document."}')
    (plan.folder / "inputs.json").unlink()
    make_task(Plan.of([f"{folder}/*"], str(tokenizer_file), f"{tmp_path}/out"), Task(0, 4), workers=1)

    with pytest.raises(ShardError, match=r"1 of 4 parts are not finished \(.*1.jsonl.zst\)"):
        open_corpus(plan.prefix)

"""Downstream tasks: scores against sums by hand and against lm-eval's own HFLM, and what the command writes."""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.winogrande import preprocess_winogrande
from rich.console import Console
from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerFast

from data_tools.tokenizer import Tokenizer
from longhorn_layers.config import LonghornConfig, ModelConfig
from longhorn_layers.hf.tokenizer import write_tokenizer
from longhorn_layers.model import LanguageModel
from pretrain.checkpoint import LoadedModel
from pretrain.config import Config, DataConfig
from pretrain.downstream import add_arguments, load_tasks, run
from pretrain.downstream.command import _configure
from pretrain.downstream.model import HarnessModel
from pretrain.downstream.results import averages, right_answer
from pretrain.downstream.tasks import _unknown
from pretrain.downstream.text import text_codec
from pretrain.evaluation.losses import EvaluationError
from pretrain.generate import Sampling, generate
from pretrain.hf.mapping import format_of, to_hf_model

TASKS = Path(__file__).parents[1] / "data" / "tasks"
CHOICES = [json.loads(line) for line in (TASKS / "messages_choice.jsonl").read_text().splitlines()]
PROSE = [json.loads(line)["text"] for line in (TASKS / "messages_prose.jsonl").read_text().splitlines()]
EOS = 2
CONTEXT = 96  # some of PROSE is longer
PAIRS = [
    ("It is the duty of the Congress", " to provide for the common defense."),
    ("Question: shall it pass?\nAnswer:", " yes"),
    ("Question: shall it pass?\nAnswer:", " no"),  # reads what the one before reads
    ("Question: shall it pass?\nAnswer: ", "no"),  # the space goes to the word
    ("We the peo", "ple of the United States"),  # a piece across the border
    ("naïve 東", "京 🙂 </s>"),
    ("", "Fellow-Citizens of the Senate:"),
    (" \n", "Fellow-Citizens"),
]


@pytest.fixture(scope="module", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Random weights, scaled so that what is far back changes the loss."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(LonghornConfig(d_state=4), vocab_size=512, d_model=16, n_layer=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("_proj.weight", "dt_head.weight")):
                weight.mul_(3)
            elif name.endswith("embedding.weight"):
                weight.mul_(10)
    return model.eval()


@pytest.fixture(scope="module")
def loaded(model: LanguageModel, shard, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:  # type: ignore[no-untyped-def]
    """The model and its folder for transformers."""
    folder = tmp_path_factory.mktemp("longhorn")
    write_tokenizer(shard.tokenizer, folder)
    (folder / "tokenizer.model").write_bytes(shard.tokenizer.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        format = format_of(model.config)
        for shipped, auto in ((format.config_class, "AutoConfig"), (format.model_class, "AutoModelForCausalLM")):
            patch.setattr(shipped, "_auto_class", auto)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        to_hf_model(model, tokenizer, torch.float32, CONTEXT).save_pretrained(folder)
    config = Config(model=model.config, data=DataConfig(train=shard.prefix, seqlen=CONTEXT))
    found = Tokenizer.load(shard.tokenizer)
    record = {"name": found.name, "sha256": found.sha256, "vocab_size": 512, "eos_id": EOS}
    return LoadedModel(model, config, 30, 123_456, record, folder)


@pytest.fixture
def ours(loaded: LoadedModel) -> HarnessModel:
    return HarnessModel(loaded.model, text_codec(loaded), CONTEXT)


@pytest.fixture(scope="module")
def processor(shard) -> SentencePieceProcessor:  # type: ignore[no-untyped-def]
    return Tokenizer.load(shard.tokenizer).processor


@torch.inference_mode()
def token_nats(model: LanguageModel, ids: Sequence[int]) -> torch.Tensor:
    """(tokens − 1, vocabulary): float64 log-probabilities of what follows each token but the last."""
    return model(torch.tensor([ids]))[0, :-1, :512].double().log_softmax(-1)


def by_hand(model: LanguageModel, processor: SentencePieceProcessor, context: str, continuation: str) -> tuple:
    """log p(continuation | context), and whether it is greedy, by the pieces' own places in the text."""
    pieces = processor.encode(context + continuation, return_type="proto").pieces
    ids = [EOS, *(piece.id for piece in pieces)]
    border = len(context.rstrip().encode())
    count = sum(piece.end > border or piece.begin >= border for piece in pieces)
    nats = token_nats(model, ids)[-count:]
    targets = torch.tensor(ids[-count:])
    return nats.gather(1, targets[:, None]).sum().item(), bool((nats.argmax(1) == targets).all()), count


def requests(kind: str, arguments: Sequence[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_choices_have_the_probability_of_the_continuation(
    ours: HarnessModel, model: LanguageModel, processor: SentencePieceProcessor
) -> None:
    first = token_nats(model, [*ours.tok_encode("The Union"), EOS])[-1].argmax().item()
    pairs = [*PAIRS, ("The Union", processor.decode([processor.piece_to_id("▁a"), first])[1:])]
    pairs += [(row["beginning"], " " + ending) for row in CHOICES for ending in row["endings"]]
    found = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for pair, (nats, greedy) in zip(pairs, found, strict=True):
        expected = by_hand(model, processor, *pair)
        assert (nats, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1]), pair
        assert ours.count_tokens(*pair) == expected[2]
    assert len({round(nats, 2) for nats, _ in found}) > len(pairs) / 2


def test_greedy_continuations_are_said_to_be(ours: HarnessModel, model: LanguageModel) -> None:
    context = ours.tok_encode("The state of the Union")
    likeliest = generate(model, context, 3, EOS, Sampling(temperature=0))
    other = [*likeliest[:2], (likeliest[2] + 1) % 512]
    found = ours.score([(context, likeliest), (context, other), (context, likeliest[:1])], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False, True]


@pytest.mark.parametrize("batch_tokens", [1, 7, 100])
def test_batches_and_chunks_do_not_change_scores(ours: HarnessModel, batch_tokens: int) -> None:
    pairs = [(ours.tok_encode(a), ours.codec.encode(b)) for a, b in [*PAIRS, (PROSE[0][:200], PROSE[1][:99])]]
    whole = ours.score(pairs, disable_tqdm=True)
    ours.batch_tokens = batch_tokens
    for (nats, greedy), (expected, same) in zip(ours.score(pairs, disable_tqdm=True), whole, strict=True):
        assert (nats, greedy) == (pytest.approx(expected, abs=1e-4), same)


def test_what_is_too_long_loses_its_beginning(ours: HarnessModel, model: LanguageModel) -> None:
    context, continuation = ours.tok_encode(PROSE[0]), ours.codec.encode("the Senate")
    read = [*context, *continuation][-CONTEXT - 1 :]
    targets = torch.tensor(continuation)[:, None]
    expected = token_nats(model, read)[-len(continuation) :].gather(1, targets).sum().item()
    ((nats, _),) = ours.score([(context, continuation)], disable_tqdm=True)
    assert nats == pytest.approx(expected, abs=1e-4)
    assert ours.cut == 1


def test_rolling_windows_and_whole_texts(ours: HarnessModel, model: LanguageModel) -> None:
    def windows(ids: list[int], size: int) -> float:
        """Each token once; the first window begins with EOS, each other with the token before it; the last is full."""
        total, stream = 0.0, [EOS, *ids]
        for start in range(0, len(ids), size):
            last = min(start + size, len(ids))
            nats = token_nats(model, stream[max(0, last - size) : last + 1])
            targets = torch.tensor(stream[start + 1 : last + 1])
            total += nats[-len(targets) :].gather(1, targets[:, None]).sum().item()
        return total

    texts = [ours.codec.encode(text) for text in PROSE]
    assert max(map(len, texts)) > 3 * CONTEXT
    for size in (CONTEXT, 10_000):
        ours.max_length = size
        found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in PROSE]), True)
        assert found == pytest.approx([windows(ids, size) for ids in texts], abs=1e-3)
    assert ours.cut == 0


def test_generation_stops_where_it_should(ours: HarnessModel, model: LanguageModel) -> None:
    expected = ours.codec.decode(generate(model, ours.tok_encode("The Union"), 20, EOS, Sampling(temperature=0)))

    def ask(**settings: Any) -> str:
        (text,) = ours.generate_until(requests("generate_until", [("The Union", settings)]), True)
        return text

    assert ask(until=[], max_gen_toks=20) == expected and len(expected) > 20
    stop = expected[5:7]
    assert ask(until=[stop], max_gen_toks=20) == expected.split(stop)[0]
    torch.manual_seed(3)
    assert ask(until=[], max_gen_toks=20, do_sample=True, temperature=5.0, top_k=50) != expected
    with pytest.raises(ValueError, match="generation_kwargs: .*num_beams"):
        ask(until=[], num_beams=4)


def test_a_long_prompt_of_a_generation_is_cut_and_counted(ours: HarnessModel) -> None:
    ours.max_length = 12
    last = ours.codec.decode(ours.tok_encode("The Union of these States", add_special_tokens=False)[-4:])
    asked = [("The Union of these States", {"until": [], "max_gen_toks": 8}), (last, {"until": [], "max_gen_toks": 7})]
    ours.generate_until(requests("generate_until", asked), True)
    assert ours.cut == 1
    with pytest.raises(ValueError, match="max_gen_toks=12 leaves no room for a prompt in 12 tokens"):
        ours.generate_until(requests("generate_until", [("The Union", {"until": [], "max_gen_toks": 12})]), True)


# ---- lm-eval's own model, on the exported folder ----


def evaluated(model: Any, task: str, few_shot: int) -> dict[str, Any]:
    (found,) = load_tasks([task], TASKS)
    _configure(found, few_shot)
    return evaluator.evaluate(model, found.found)


def numbers(found: dict[str, Any], task: str) -> dict[str, float]:
    return {name: value for name, value in found["results"][task].items() if isinstance(value, float)}


@pytest.mark.parametrize(
    ("task", "few_shot", "begins_with_eos"),
    [("messages_choice", 0, True), ("messages_choice", 2, True), ("messages_prose", 0, False)],
)
def test_lm_evals_own_model_gives_the_same(
    ours: HarnessModel, loaded: LoadedModel, task: str, few_shot: int, begins_with_eos: bool
) -> None:
    theirs = HFLM(
        str(loaded.path),
        trust_remote_code=True,
        device="cpu",
        max_length=CONTEXT,
        batch_size=4,
        **({"add_bos_token": True} if begins_with_eos else {}),
    )
    assert (theirs.prefix_token_id, theirs.tok_encode("a")[0] == EOS) == (EOS, begins_with_eos)
    one, other = (evaluated(each, task, few_shot) for each in (ours, theirs))
    for mine, yours in zip(one["samples"][task], other["samples"][task], strict=True):
        assert mine["arguments"] == yours["arguments"]
        for (answer,), (expected,) in zip(mine["resps"], yours["resps"], strict=True):
            assert answer == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert numbers(one, task) == pytest.approx(numbers(other, task), rel=1e-4)


# ---- the command ----


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def evaluate(loaded: LoadedModel, output: Path, names: str, *more: str) -> dict[str, Any]:
    parsed = options("--tasks", names, "--task-dir", str(TASKS), *more)
    tasks = load_tasks(parsed.tasks, parsed.task_dir)
    path = run(loaded, tasks, parsed, output, Console(width=200))
    return json.loads(path.read_text())


def test_the_report_is_what_the_documents_give(
    loaded: LoadedModel,
    processor: SentencePieceProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = evaluate(loaded, tmp_path, "messages_choice,messages_prose", "--task-context", "5000")
    right = normalized = 0
    nats, tokens = 0.0, 0
    for row in CHOICES:
        scores = [by_hand(loaded.model, processor, row["beginning"], " " + ending) for ending in row["endings"]]
        by_length = [score / len(ending) for (score, *_), ending in zip(scores, row["endings"], strict=True)]
        right += max(scores)[0] == scores[row["label"]][0]
        normalized += max(by_length) == by_length[row["label"]]
        nats, tokens = nats - scores[row["label"]][0], tokens + scores[row["label"]][2]
    choice = report["tasks"]["messages_choice"]
    assert choice["metrics"]["acc"]["value"] == pytest.approx(right / 15)
    assert choice["metrics"]["acc_norm"]["value"] == pytest.approx(normalized / 15)
    share = right / 15
    assert choice["metrics"]["acc"]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 14))
    assert choice["answer_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert (choice["documents"], choice["version"], choice["few_shot"]) == (15, 1.0, 0)
    total = 0.0
    for text in PROSE:
        ids = [EOS, *processor.encode(text)]
        total -= token_nats(loaded.model, ids).gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    bits = total / math.log(2) / sum(len(text.encode()) for text in PROSE)
    assert report["tasks"]["messages_prose"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-6)
    assert report["average"]["accuracy"] == choice["metrics"]["acc"]["value"]
    assert (report["step"], report["consumed_tokens"], report["task_context"]) == (30, 123_456, 5000)
    assert (report["prefix"], report["cut_requests"], report["lm_eval"]) == (EOS, 0, "0.4.13")
    assert report["tokenizer"]["sha256"] == loaded.tokenizer["sha256"]
    shown = capsys.readouterr().out
    assert "acc*" in shown and f"{bits:.4f}" in shown and str(tmp_path / "downstream.json") in shown

    # Again: nothing is scored. With a group of both, or other settings: scored anew.
    monkeypatch.setattr(HarnessModel, "score", lambda *_: pytest.fail("scored again"))
    assert evaluate(loaded, tmp_path, "messages_choice,messages_prose", "--task-context", "5000") == report
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        evaluate(loaded, tmp_path, "messages_choice", "--limit", "3")


def test_a_killed_evaluation_goes_on_at_the_next_task(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = HarnessModel.loglikelihood

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HarnessModel, "loglikelihood_rolling", killed)
        evaluate(loaded, tmp_path, "messages_choice,messages", "--limit", "3")
    assert not (tmp_path / "downstream.json").exists()
    asked = []
    monkeypatch.setattr(HarnessModel, "loglikelihood", lambda self, reqs: asked.extend(reqs) or score(self, reqs))
    report = evaluate(loaded, tmp_path, "messages_choice,messages", "--limit", "3")
    assert {request.task_name for request in asked} == {"messages_choice"}  # of the group alone
    assert len(asked) == sum(len(row["endings"]) for row in CHOICES[:3])
    assert set(report["tasks"]) == {"messages_choice", "messages_prose"}
    assert report["tasks"]["messages_choice"]["documents_in_task"] == 15
    assert report["cut_requests"] == 0


def test_changed_data_is_evaluated_anew(tmp_path: Path) -> None:
    before = load_tasks(["messages_choice"], TASKS)
    assert load_tasks(["messages_choice"], TASKS)[0].digest == before[0].digest
    for path in TASKS.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("the", "thy"))
    assert load_tasks(["messages_choice"], tmp_path)[0].digest != before[0].digest


def test_the_right_answer_is_found_as_lm_eval_finds_it() -> None:
    doc = {
        "sentence": "The box held no cup because the _ was small.",
        "option1": "box",
        "option2": "cup",
        "answer": "2",
    }
    names = ("doc_to_text", "doc_to_target", "doc_to_choice")
    functions = {name: getattr(preprocess_winogrande, name) for name in names}
    assert right_answer(SimpleNamespace(multiple_input=2, **functions), doc) == 1
    choices = {"doc_to_text": str, "doc_to_choice": lambda doc: ["no", "yes"]}
    for target, expected in (("yes", 1), (0, 0), ("maybe", None), ([0, 1], None)):
        task = SimpleNamespace(multiple_input=0, doc_to_target=lambda doc, target=target: target, **choices)
        assert right_answer(task, {}) == expected


def test_which_accuracies_are_averaged() -> None:
    def task(answer: float | None, **metrics: float) -> dict[str, Any]:
        return {"metrics": {name: {"value": value} for name, value in metrics.items()}, "answer_perplexity": answer}

    found = averages(
        {
            "hellaswag": task(20.0, acc=0.3, acc_norm=0.5),
            "piqa": task(30.0, acc=0.7, acc_norm=0.1),
            "wikitext": task(None, word_perplexity=17.0),
        }
    )
    assert found["accuracy"] == pytest.approx(0.6) and found["answer_perplexity"] == pytest.approx(25.0)
    assert found["answer_perplexity_of"] == ["hellaswag", "piqa"]
    assert found["accuracy_of"] == {"hellaswag": "acc_norm", "piqa": "acc"}
    assert averages({"wikitext": task(None, word_perplexity=17.0)})["accuracy"] is None


def test_what_cannot_be_evaluated_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = dict.fromkeys(["hellaswag", "piqa", "wikitext"])
    assert _unknown("helaswag", known, None) == "--tasks helaswag: lm-eval has no such task; near it are hellaswag"
    with pytest.raises(EvaluationError, match="missing is no folder"):
        load_tasks(["piqa"], tmp_path / "missing")
    for path in TASKS.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    with pytest.raises(EvaluationError, match=r"--tasks messages_prose: can't be loaded: .*prose.jsonl.*--task-dir"):
        load_tasks(["messages_prose"], tmp_path)
    for wrong in (["--tasks", "piqa,,boolq"], ["--limit", "0"], ["--few-shot", "-1"]):
        with pytest.raises(SystemExit):
            options(*wrong)
    assert "must be at least 0" in capsys.readouterr().err


@pytest.mark.slow  # lm-eval reads all its tasks first
def test_lm_evals_own_command_on_the_folder(loaded: LoadedModel, ours: HarnessModel, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"neither .* nor lm-eval has such a task; near it are .*hellaswag"):
        load_tasks(["helaswag"], TASKS)
    for task, more in (("messages_choice", ",add_bos_token=True"), ("messages_prose", "")):
        model = f"pretrained={loaded.path},trust_remote_code=True,max_length={CONTEXT}{more}"
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model, "--device", "cpu"]
        command += ["--tasks", task, "--include_path", str(TASKS), "--output_path", str(tmp_path / task)]
        done = subprocess.run(command, cwd=TASKS, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / task).rglob("results_*.json")
        theirs = numbers(json.loads(path.read_text()), task)
        assert numbers(evaluated(ours, task, 0), task) == pytest.approx(theirs, rel=1e-4)

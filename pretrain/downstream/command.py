"""`pretrain.evaluate`'s options for downstream tasks, and running them."""

import argparse
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import torch
from rich.console import Console

from data_tools.files import write_durably
from pretrain.checkpoint import LoadedModel
from pretrain.downstream.results import averages, described, show
from pretrain.downstream.tasks import Requested
from pretrain.downstream.text import text_codec
from pretrain.evaluation.source import provenance, training_context

if TYPE_CHECKING:  # takes seconds
    from pretrain.downstream.model import HarnessModel

RESULT = "downstream.json"
FINISHED = "downstream"  # holds a file for each name that is done, by which a killed evaluation goes on
CONTEXT = 2048  # where it isn't known what the model was trained at; lm-eval's own default
SEED = 1234  # of what examples are drawn, and of sampling; lm-eval's own default
RESAMPLED = 1000  # times, for the errors of metrics that have no formula for theirs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `load_tasks` and `run` are given."""
    group = parser.add_argument_group("downstream tasks, through lm-eval")
    group.add_argument("--tasks", type=_names, metavar="NAME,…", help="tasks, groups or tags of lm-eval or --task-dir")
    group.add_argument("--task-dir", type=Path, metavar="DIR", help="YAML files of your own tasks; they may run code")
    group.add_argument("--limit", type=_from(1), metavar="N", help="only the first N documents of each task")
    group.add_argument("--few-shot", type=_from(0), metavar="N", help="solved examples in front; default: the task's")
    context = "tokens that a request may have, and of a window of rolling perplexity; default: the training context"
    group.add_argument("--task-context", type=_from(1), metavar="N", help=context)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: write names like piqa,hellaswag")
    return list(dict.fromkeys(names))


def _from(least: int) -> Any:
    def count(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    return count


def run(
    loaded: LoadedModel, requested: Sequence[Requested], parsed: argparse.Namespace, output: Path, console: Console
) -> Path:
    """Evaluate each task, print a table, and write downstream.json into `output`; returns its path.

    What was finished before with the same weights, documents and settings is not run again.

    Raises TokenizerError or EvaluationError where the model's tokenizer can't be had.
    """
    from pretrain.downstream.model import HarnessModel

    context = parsed.task_context or training_context(loaded) or CONTEXT
    model = HarnessModel(loaded.model, text_codec(loaded), context)
    made_of = provenance(loaded) | {
        "limit": parsed.limit,
        "few_shot": parsed.few_shot,
        "task_context": context,
        "prefix": model.prefix_token_id,
        "device": str(model.device),
        "lm_eval": importlib.metadata.version("lm_eval"),
        "torch": importlib.metadata.version("torch"),
    }
    (output / FINISHED).mkdir(parents=True, exist_ok=True)
    tasks: dict[str, Any] = {}
    averaged: dict[str, Any] = {}
    cut = 0
    for part in requested:
        path = output / FINISHED / (re.sub(r"[^\w.-]", "_", part.name) + ".json")
        found = _finished(path, made_of | {"digest": part.digest}) or _run(model, part, made_of, path)
        tasks |= found["tasks"]
        cut += found["cut_requests"]
        averaged |= {part.name: found["tasks"][part.name]} if part.name in found["tasks"] else found["tasks"]
    report = made_of | {"tasks": tasks, "average": averages(averaged), "cut_requests": cut}
    write_durably(output / RESULT, orjson.dumps(report, option=orjson.OPT_INDENT_2))
    show(report, console)
    console.print(str(output / RESULT), highlight=False, markup=False, soft_wrap=True)
    return output / RESULT


def _finished(path: Path, made_of: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier run wrote, if it was made of the same."""
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    same = isinstance(found, dict) and found.get("made_of") == orjson.loads(orjson.dumps(made_of))
    return found if same else None


def _run(model: "HarnessModel", part: Requested, made_of: dict[str, Any], path: Path) -> dict[str, Any]:
    """What comes of the tasks of one name; written to `path`, too."""
    from lm_eval.evaluator import evaluate

    _configure(part, made_of["few_shot"])
    torch.manual_seed(SEED)
    model.cut = 0
    found = evaluate(model, part.found, limit=made_of["limit"], bootstrap_iters=RESAMPLED)
    tasks = {
        name: described(found, name, part.found["tasks"].get(name), model.count_tokens) for name in found["results"]
    }
    tasks = {name: task for name, task in tasks.items() if task["metrics"]}  # a group may have none of its own
    content = {"made_of": made_of | {"digest": part.digest}, "tasks": tasks, "cut_requests": model.cut}
    write_durably(path, orjson.dumps(content, option=orjson.OPT_INDENT_2))
    return content


def _configure(part: Requested, few_shot: int | None) -> None:
    """As lm-eval's own command does: a task that is defined without solved examples stays so."""
    for task in part.found["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (few_shot is not None and own != 0):
            task.set_config(key="num_fewshot", value=few_shot or 0)
        task.set_fewshot_seed(seed=SEED)

"""What is kept of lm-eval's results, and how it is shown."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pretrain.evaluation.losses import perplexity
from pretrain.evaluation.report import number

NORMALIZED = {"arc_challenge", "hellaswag", "openbookqa"}  # of which papers customarily give acc_norm, of others acc

CountTokens = Callable[[str, str], int]  # of a continuation after its context


def described(found: Mapping[str, Any], name: str, task: Any, count_tokens: CountTokens) -> dict[str, Any]:
    """What lm-eval found of `task`, or of a group; metrics as {name: {value, stderr, higher_is_better}}."""
    row = found["results"][name]
    metrics = {}
    for key, value in row.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        error = row.get(f"{metric}_stderr,{filtered}")
        metrics[metric if filtered == "none" else key] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, Real) else None,
            "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
        }
    documents = found["n-samples"].get(name, {})
    return {
        "version": found["versions"].get(name),
        "few_shot": found["n-shot"].get(name),
        "documents": documents.get("effective"),
        "documents_in_task": documents.get("original"),
        "metrics": metrics,
        "answer_perplexity": answer_perplexity(
            found["samples"].get(name, []), partial(right_answer, task), count_tokens
        ),
    }


def right_answer(task: Any, doc: Any) -> int | None:
    """Which of a document's choices is right, as lm-eval finds it; None where it is no single one.

    A task whose contexts differ and whose continuations don't, like winogrande, has it for the text.
    """
    gold = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
    if isinstance(gold, str):
        choices = task.doc_to_choice(doc)
        return choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) else None


def answer_perplexity(
    samples: Sequence[Mapping[str, Any]], right_answer: Callable[[Any], int | None], count_tokens: CountTokens
) -> float | None:
    """Perplexity per token of the right answers after their contexts; None where there is no choice.

    It goes on telling models apart where accuracies are still those of chance.
    """
    nats, tokens = 0.0, 0
    for sample in samples:
        choices = sample["arguments"]
        right = right_answer(sample["doc"]) if len(choices) > 1 else None
        if right is None:
            return None
        nats -= sample["resps"][right][0][0]
        tokens += count_tokens(*choices[right])
    return perplexity(nats / tokens) if tokens else None


def customary(name: str, metrics: Mapping[str, Any]) -> str | None:
    """The accuracy by which papers compare models on a task: acc_norm of some, acc of others; None without one."""
    wanted = ("acc_norm", "acc") if name in NORMALIZED else ("acc",)
    return next((metric for metric in wanted if metric in metrics), None)


def averages(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Means over tasks: of their customary accuracies, and of the perplexities of their right answers."""
    chosen = {name: metric for name, task in tasks.items() if (metric := customary(name, task["metrics"]))}
    perplexities = {n: task["answer_perplexity"] for n, task in tasks.items() if task["answer_perplexity"] is not None}
    return {
        "accuracy": _mean([number(tasks[name]["metrics"][metric]["value"]) for name, metric in chosen.items()]),
        "accuracy_of": chosen,
        "answer_perplexity": _mean(list(perplexities.values())),
        "answer_perplexity_of": list(perplexities),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print the table: a row for each metric, those that are averaged marked; ruled on a terminal, bare elsewhere."""
    table = Table("task", "metric", box=SIMPLE_HEAD if console.is_terminal else None)
    for column in ("value", "±", "documents", "shots"):
        table.add_column(column, justify="right")
    average = report["average"]
    for name, task in report["tasks"].items():
        counts = ["" if task[key] is None else f"{task[key]:,}" for key in ("documents", "few_shot")]
        for metric, found in task["metrics"].items():
            mark = "*" if average["accuracy_of"].get(name) == metric else ""
            error = "" if found["stderr"] is None else f"{found['stderr']:.4f}"
            table.add_row(name, metric + mark, f"{number(found['value']):.4f}", error, *counts)
        if task["answer_perplexity"] is not None:
            table.add_row(name, "answer perplexity", f"{task['answer_perplexity']:.4f}", "", *counts)
    of = len(average["answer_perplexity_of"])
    for key, title in (("accuracy", "accuracies*"), ("answer_perplexity", f"answer perplexities of {of}")):
        if average[key] is not None:
            table.add_row("average", title, f"{average[key]:.4f}")
    console.print(table, highlight=False)
    if report["cut_requests"]:
        cut = f"{report['cut_requests']:,} requests longer than {report['task_context']:,} tokens lost their beginning"
        console.print(cut, highlight=False, soft_wrap=True)

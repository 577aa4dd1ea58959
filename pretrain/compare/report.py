"""The report: Markdown, JSON and pictures in the comparison's folder."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from pretrain.compare.config import CompareConfig, Comparison, ModelEntry
from pretrain.compare.curves import TokenRatio
from pretrain.compare.plots import draw_contexts, draw_losses, draw_rates
from pretrain.compare.results import ModelResult, Pair, Results, mean
from pretrain.compare.runs import at_edge
from pretrain.report_files import write_files

RATIO_NOTE = """\
*Token ratio*: the tokens that a model needs over those that {reference} needs, both to the loss which is the lowest
that both reach (the worse one's best). Validation losses are joined by straight lines over the logarithm of the
tokens, the lowest so far counting. Above 1, {reference} learns from fewer tokens. *Mean curves*: of the losses'
means over the seeds. *By seed*: of the two runs with the same data order. The learning rate falls over the whole of a
run, so that a loss on the way is higher than a run that ends there would have: this draws the ratio towards 1.
*Ends of schedules* lies on the line between the ends of two runs each, the grid's ({grid:,} tokens) and the full one,
with the first seed. Each of these ended at its lowest rate; but the true curve bends below a line through two points,
which draws this ratio towards 1 too. "≥" and "≤": a curve was there at its first point already; "unknown": both
were."""


def write_report(comparison: Comparison, results: Results, made_of: dict[str, Any]) -> list[Path]:
    """Write report.md, report.json and the PNGs, each whole or not at all.

    Args:
        made_of: what the numbers were made of (`provenance` of kernels/benchmarks/record.py, speed, elapsed time).

    Returns:
        The files, report.md first.
    """
    models, config = list(results.models.values()), comparison.config
    pictures = {"loss.png": draw_losses(models), "learning_rate.png": draw_rates(models, config.lr_tokens)}
    for i in range(len(models[0].perplexity)):
        name = "perplexity.png" if i == 0 else f"perplexity_{i + 1}.png"
        pictures[name] = draw_contexts(models, comparison.base.data.seqlen, i)
    contents = {
        "report.md": markdown(comparison, results, made_of, list(pictures)).encode(),
        "report.json": orjson.dumps(
            results.to_dict() | {"made_of": made_of}, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
        ),
        **pictures,
    }
    return write_files(comparison.run_dir, contents)


def markdown(comparison: Comparison, results: Results, made_of: dict[str, Any], pictures: Sequence[str]) -> str:
    """The report's text; `pictures`: names of the PNGs beside it."""
    sections = [
        f"# {', '.join(results.models)}: {comparison.config.total_tokens:,} tokens each",
        "\n".join(f"- {sentence(pair, results)}" for pair in results.pairs),
        "## Loss and speed",
        _models_table(comparison, results, made_of),
        _picture("loss.png", "Validation loss over tokens"),
        "## Tokens to equal loss",
        _ratio_table(results),
        RATIO_NOTE.format(reference=results.reference, grid=comparison.config.lr_tokens),
        "## Perplexity over context",
        *_perplexity_sections(comparison, results, pictures),
        "## Learning rates",
        *_rates_section(comparison, results),
        _picture("learning_rate.png", "Final validation loss over the learning rate"),
        "## How this was made",
        _provenance(comparison, results, made_of),
    ]
    return "\n\n".join(sections) + "\n"


def sentence(pair: Pair, results: Results) -> str:
    """The finding on one pair, in words."""
    differences = pair.differences
    sides = {difference > 0 for difference in differences}
    agree = "with every seed" if len(sides) == 1 and 0 not in differences else "but the seeds disagree on the sign"
    return (
        f"**{pair.other}** needs {_times(pair.ratio)} the tokens of {results.reference} to equal loss "
        f"(by seed {', '.join(map(_times, pair.by_seed))}); its final loss is {mean(differences):+.4f} from "
        f"{results.reference}'s ({', '.join(f'{d:+.4f}' for d in differences)}), {agree}."
    )


def _times(ratio: TokenRatio) -> str:
    if ratio.bound == "?":
        return "unknown"
    sign = {">": "≥ ", "<": "≤ ", "": ""}[ratio.bound]
    return f"{sign}{ratio.ratio:.2f}×"


def _models_table(comparison: Comparison, results: Results, made_of: dict[str, Any]) -> str:
    reference = results.models[results.reference]
    rows = []
    for model in results.models.values():
        size = f"{model.model.n_layer} × {model.model.d_model}"
        if model.model.d_ff:
            size += f", d_ff {model.model.d_ff:,}"
        rows.append(
            [
                model.name,
                size,
                f"{model.parameters:,} ({model.parameters / reference.parameters - 1:+.2%})",
                f"{model.flops_per_token / 1e6:,.1f}M",
                f"{model.lr:g}" + (" (edge)" if at_edge(model.lr, comparison.config.learning_rates) else ""),
                f"{mean(model.finals):.4f}",
                _each(model.finals),
                f"{mean(model.bits_per_byte):.4f}",
                f"{model.tokens_per_second:,.0f} ({model.tokens_per_second / reference.tokens_per_second:.2f}×)",
            ]
        )
    seeds = ", ".join(map(str, comparison.config.seeds))
    header = ["model", "layers × width", "parameters", "FLOPs/token", "lr", "validation loss, mean", f"seeds {seeds}"]
    header += ["bits/byte", "training tokens/s"]
    speed = made_of["speed"]
    note = (
        f"Validation loss: nats per token at the end, over the first {comparison.base.eval.tokens:,} tokens of the "
        f"held-out data in windows of {comparison.base.data.seqlen:,}; seeds differ in the initial weights and in the "
        "order of the data, which is the same for all models with one seed. Bits per byte: at "
        f"{min(comparison.config.contexts):,} tokens of context, over the evaluated documents. Tokens per second: "
        f"measured alone and side by side, the median of {speed['steps']} steps of each in turn (a micro-batch of "
        f"{speed['micro_batch_size']} × {speed['context']:,}, forward, backward, clipping, AdamW), on one "
        f"{speed['hardware_name']}"
        + (f", {speed['threads']} thread(s)" if speed["device"] == "cpu" else "")
        + f", whose load average was {speed['hardware']['load_average']} before."
    )
    return f"{_table(header, rows)}\n\n{note}"


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _ratio_table(results: Results) -> str:
    rows = [
        [
            pair.other,
            f"{pair.ratio.loss:.4f}",
            f"{pair.ratio.other_tokens:,.0f}",
            f"{pair.ratio.reference_tokens:,.0f}",
            _times(pair.ratio),
            ", ".join(map(_times, pair.by_seed)),
            _times(pair.annealed),
        ]
        for pair in results.pairs
    ]
    header = ["model", "equal loss", "its tokens", f"{results.reference}'s tokens", "token ratio, mean curves"]
    return _table(header + ["by seed", "ends of schedules"], rows)


def _perplexity_sections(comparison: Comparison, results: Results, pictures: Sequence[str]) -> list[str]:
    contexts = sorted(comparison.config.contexts)
    sections = []
    names = [name for name in pictures if name.startswith("perplexity")]
    for i, picture in enumerate(names):
        rows = [_perplexity_row(model, i, contexts) for model in results.models.values()]
        found = next(iter(results.models.values())).perplexity[i]
        header = [f"documents: {found.documents}", *(f"{context:,}" for context in contexts)]
        header.append(f"{contexts[-1] // contexts[0]}×/1×, by seed")
        sections += [_table(header, rows), _picture(picture, f"Perplexity over context, documents: {found.documents}")]
    note = (
        f"Trained at {comparison.base.data.seqlen:,} tokens. Non-overlapping windows, every token scored, the same "
        "targets at each context; geometric mean over the seeds. 1.00 or less in the last column: what lies further "
        "back does not hurt."
    )
    return [*sections, note]


def _perplexity_row(model: ModelResult, document_set: int, contexts: Sequence[int]) -> list[str]:
    found = model.perplexity[document_set]
    return [
        model.name,
        *(f"{found.mean(context):.3f}" for context in contexts),
        ", ".join(f"{ratio:.4f}" for ratio in found.ratios),
    ]


def _rates_section(comparison: Comparison, results: Results) -> list[str]:
    config = comparison.config
    rates = sorted(config.learning_rates)
    rows = []
    for model in results.models.values():
        cells = []
        for rate in rates:
            loss = model.grid[rate]
            cell = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
            cells.append(f"**{cell}**" if rate == model.lr else cell)
        rows.append([model.name, *cells])
    note = (
        f"Final validation loss of {config.lr_tokens:,} tokens, whole schedule, seed {config.seeds[0]}; the lowest, in "
        f"bold, is the rate of the full trainings of {config.total_tokens:,} tokens, whose own best may be lower."
    )
    edges = [model.name for model in results.models.values() if at_edge(model.lr, rates)]
    if edges:
        note += f" At the grid's edge, so that a better rate may lie outside it: {', '.join(edges)}."
    return [_table(["model", *(f"{rate:g}" for rate in rates)], rows), note]


def _provenance(comparison: Comparison, results: Results, made_of: dict[str, Any]) -> str:
    config, base, hardware = comparison.config, comparison.base, made_of["hardware"]
    each = f"{config.gpus_per_run} GPU(s)" if config.gpus_per_run else f"{base.train.threads or 'all'} thread(s)"
    schedule = (
        f"warm-up over {base.optim.warmup_fraction:.0%}, cosine to {base.optim.min_lr / base.optim.lr:.0%} of the rate"
    )
    shown = ("python", "torch", "triton", "cuda", "compiler")
    rows = {
        "command": f"`{made_of['command']}`",
        "all models": _recipe(config),
        **{name: _recipe(entry) for name, entry in config.models.items()},
        "each training": f"{base.tokens_per_step:,} tokens a step, {base.train.precision}, {schedule}, "
        f"weight decay {base.optim.weight_decay:g}",
        "training data": f"`{base.data.train}`, digest `{results.train_digest}`",
        "validation data": f"`{base.data.valid}`, digest `{made_of['valid_digest']}`",
        "trained by commit": ", ".join(f"`{commit}`" for commit in results.commits),
        "hardware": f"{hardware['cpu']}, {hardware['cores']} cores; trained on {made_of['device_name']}",
        "at a time": f"{config.workers} training(s), {each} each",
        "versions": ", ".join(f"{name} {made_of['versions'][name]}" for name in shown if made_of["versions"].get(name)),
        "time of all trainings and evaluations": f"{made_of['elapsed_seconds'] / 60:,.0f} min",
        "date": made_of["date"],
    }
    return _table(["", ""], [[name, text] for name, text in rows.items()])


def _recipe(given: CompareConfig | ModelEntry) -> str:
    """A config's file and overrides, where it has any."""
    words = " ".join(filter(None, [given.config, *given.overrides]))
    return f"`{words}`" if words else "nothing else"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:" if len(header) > 2 else "---"] * (len(header) - 1)]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _picture(name: str, text: str) -> str:
    return f"![{text}]({name})"

"""The report's pictures, as PNG bytes."""

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, ScalarFormatter

from pretrain.compare.results import ModelResult
from pretrain.report_files import png_bytes


def _draw(draw: Callable[[Axes], None], **labels: str) -> bytes:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set(**labels)
    axes.grid(alpha=0.3)
    axes.legend()
    return png_bytes(figure)


def draw_losses(models: Sequence[ModelResult]) -> bytes:
    """Validation loss over tokens: the mean over the seeds as a line, from least to most as a band."""

    def draw(axes: Axes) -> None:
        for model in models:
            tokens, by_point = model.curves[0].tokens, list(zip(*(c.losses for c in model.curves), strict=True))
            (line,) = axes.plot(tokens, model.mean_curve.losses, marker=".", label=f"{model.name}, lr {model.lr:g}")
            axes.fill_between(tokens, [*map(min, by_point)], [*map(max, by_point)], color=line.get_color(), alpha=0.25)
        axes.set_xscale("log")
        # Before a tenth of the tokens all fall alike, and would leave the rest no room.
        late = [
            loss
            for m in models
            for c in m.curves
            for tokens, loss in zip(c.tokens, c.losses, strict=True)
            if tokens >= c.tokens[-1] / 10
        ]
        margin = 0.05 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)
        axes.set_xlim(min(m.curves[0].tokens[-1] for m in models) / 12, None)

    seeds = len(models[0].curves)
    title = f"mean of {seeds} seeds; band: from the least to the most" if seeds > 1 else "one seed"
    return _draw(draw, xlabel="tokens", ylabel="validation loss (nats per token)", title=title)


def draw_rates(models: Sequence[ModelResult], tokens: int) -> bytes:
    """The grid's final losses over the learning rate; what diverged is missing."""

    def draw(axes: Axes) -> None:
        for model in models:
            points = sorted((lr, loss) for lr, loss in model.grid.items() if math.isfinite(loss))
            axes.plot(*zip(*points, strict=True), marker="o", label=model.name)
        rates = sorted({lr for model in models for lr in model.grid})
        axes.set_xscale("log")
        axes.set_xticks(rates, labels=[f"{rate:g}" for rate in rates])
        axes.minorticks_off()

    title = f"the grid: {tokens:,} tokens, one seed"
    return _draw(draw, xlabel="learning rate", ylabel="final validation loss (nats per token)", title=title)


def draw_contexts(models: Sequence[ModelResult], training_context: int, document_set: int) -> bytes:
    """Perplexity over context of one document set, mean over the seeds and band; both axes logarithmic."""

    def draw(axes: Axes) -> None:
        for model in models:
            found = model.perplexity[document_set]
            contexts, values = list(found.contexts), list(found.contexts.values())
            (line,) = axes.plot(contexts, [found.mean(c) for c in contexts], marker="o", label=model.name)
            axes.fill_between(contexts, [*map(min, values)], [*map(max, values)], color=line.get_color(), alpha=0.25)
        axes.axvline(training_context, color="grey", linestyle="--", label=f"trained at {training_context:,}", zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, labels=[f"{context:,}" for context in contexts])
        axes.set_yscale("log")  # one model's may be many times another's
        axes.yaxis.set_major_locator(AutoLocator())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()

    found = models[0].perplexity[document_set]
    title = f"documents: {found.documents} ({found.count:,})"
    return _draw(draw, xlabel="context (tokens)", ylabel="perplexity per token", title=title)

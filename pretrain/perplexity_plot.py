"""The plot of perplexity over context, as PNG bytes."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def draw_perplexity(series: Mapping[str, Sequence[tuple[int, float]]], training_context: int, title: str) -> bytes:
    """A PNG with a line per set of documents: (context in tokens, perplexity) points, log₂ x axis.

    A vertical line marks the context that the model was trained at. Infinite or NaN perplexities
    leave a gap.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axvline(
        training_context,
        color="grey",
        linestyle="--",
        label=f"trained at {training_context:,}",
        zorder=0,
    )
    contexts = sorted({context for points in series.values() for context, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, labels=[f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set(xlabel="context (tokens)", ylabel="perplexity per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()

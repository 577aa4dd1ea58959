"""The plots, as PNG bytes: perplexity over context, and the loss over the position in it."""

import math
from collections.abc import Collection, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.evaluation.losses import PositionLoss
from pretrain.evaluation.published import PublishedCurve
from pretrain.report_files import png_bytes

WIDE = 3.0  # times between the highest and the lowest perplexity from which the axis is logarithmic
SETTLED = 32  # from this position on all losses are in the picture, however high the first ones are


def draw_perplexity(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    training_contexts: Collection[int],
    title: str,
    references: Sequence[PublishedCurve] = (),
) -> bytes:
    """A panel for each name, with a line of (context in tokens, perplexity) points for each label.

    Vertical lines mark what was trained at. The first panel shows the references, too. Infinite or NaN perplexities
    leave a gap.
    """
    figure, axes = _panels(panels, title)
    drawn: Sequence[PublishedCurve] = references
    for own, lines in zip(axes, panels.values(), strict=True):
        for label, points in lines.items():
            own.plot(*zip(*points, strict=True), marker="o", label=label)
        for number, curve in enumerate(drawn):
            grey, marker = str(0.25 + 0.15 * number), "^sDv"[number % 4]
            own.plot(*zip(*curve.points, strict=True), color=grey, marker=marker, linestyle=":", label=curve.title)
        every = [point for points in [*lines.values(), *(curve.points for curve in drawn)] for point in points]
        drawn = ()
        heights = [height for _, height in every if math.isfinite(height)]
        if heights and max(heights) > WIDE * min(heights):
            own.set_yscale("log")
            own.yaxis.set_major_formatter("{x:g}")
        _finish(own, sorted({context for context, _ in every}), training_contexts)
        own.set(xlabel="context (tokens)", ylabel="perplexity per token")
    return png_bytes(figure)


def draw_positions(
    panels: Mapping[str, Mapping[str, Sequence[PositionLoss]]], training_contexts: Collection[int], title: str
) -> bytes:
    """A panel for each name, with a line for each label: loss over position, in a band of ± one standard error."""
    figure, axes = _panels(panels, title)
    for own, lines in zip(axes, panels.values(), strict=True):
        for label, positions in lines.items():
            x = [math.sqrt(position.first * position.last) for position in positions]
            low = [position.loss - position.standard_error for position in positions]
            high = [position.loss + position.standard_error for position in positions]
            [line] = own.plot(x, [position.loss for position in positions], marker=".", label=label)
            own.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        last = max((position.last for positions in lines.values() for position in positions), default=1)
        _finish(own, [1 << octave for octave in range(last.bit_length())], training_contexts)
        own.set(xlabel="tokens of context before the target", ylabel="loss (nats per token), ± standard error")
        _show_settled(own, [position for positions in lines.values() for position in positions])
    return png_bytes(figure)


def _show_settled(axes: Axes, positions: Sequence[PositionLoss]) -> None:
    """Cut the first positions' losses off at the top: with no context they are nats above the rest."""
    settled = [p.loss for p in positions if p.last >= min(SETTLED, positions[-1].last) and math.isfinite(p.loss)]
    if settled and (room := 0.25 * (max(settled) - min(settled))) > 0:
        axes.set_ylim(min(settled) - room, max(settled) + room)


def _panels(panels: Mapping[str, object], title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7 * len(panels), 4.8), layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(1, len(panels), squeeze=False)[0])
    for own, name in zip(axes, panels, strict=True):
        own.set_title(name, fontsize="medium")
    return figure, axes


def _finish(axes: Axes, ticks: Sequence[int], training_contexts: Collection[int]) -> None:
    for context in sorted(training_contexts):
        axes.axvline(context, color="grey", linestyle="--", label=f"trained at {context:,}", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks], rotation=45 if len(ticks) > 8 else 0)
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")

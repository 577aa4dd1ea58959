"""The picture of a dataset: documents and tokens by document length, and tokens by rank, for each source; as PNG."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from data_tools.statistics import Lengths

# Okabe and Ito's colours, which the colour-blind can tell apart, without their yellow (too pale on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
MARKS = (2048, 8192, 32768)
BINS_PER_OCTAVE = 2
WIDTH, HEIGHT, DPI = 13, 8.5, 130
Looks = Sequence[dict[str, Any]]  # of each source's line


def short_number(value: float) -> str:
    """A length as its multiple of 1024: 512, 2k, 1M."""
    for factor, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def bin_edges(longest: int) -> np.ndarray:
    """Edges of the bins of lengths, from 1: half octaves, exact at powers of two."""
    octaves = max(int(longest).bit_length(), MARKS[-1].bit_length())
    return np.unique(np.round(2 ** np.arange(0, octaves + 0.1, 1 / BINS_PER_OCTAVE)).astype(np.int64))


def draw(names: Sequence[str], lengths: Sequence[Lengths], frequencies: Sequence[np.ndarray], title: str) -> bytes:
    """Four panels, a colour and line style for each source; sources are ordered by their tokens.

    Args:
        lengths: of each source's documents.
        frequencies: of each source's tokens in a sample, the most frequent first.
    """
    order = sorted((n for n in range(len(names)) if lengths[n].tokens), key=lambda n: -lengths[n].tokens)
    looks: Looks = [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]} for i in range(len(order))
    ]
    chosen = [lengths[n] for n in order]
    edges = bin_edges(max((each.longest for each in chosen), default=1))
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    panels = figure.subplots(2, 2)
    _documents(panels[0, 0], chosen, edges, looks)
    _tokens(panels[0, 1], chosen, edges, looks)
    _at_least(panels[1, 0], chosen, edges, looks)
    _ranks(panels[1, 1], [frequencies[n] for n in order], looks)
    shortest = min((int(edges[edges <= each.values[0]][-1]) for each in chosen if each.values[0]), default=1)
    for axes in panels.flat[:3]:
        _length_axis(axes, edges, shortest)
    total = sum(each.tokens for each in chosen)
    labels = [f"{names[n]} ({lengths[n].tokens / total:.1%} of tokens)" for n in order]
    handles = panels[0, 0].get_lines()[: len(order)]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(len(order), 1)), frameon=False)
    figure.suptitle(title, fontsize="x-large")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    return image.getvalue()


def _steps(
    axes: Axes, lengths: Sequence[Lengths], edges: np.ndarray, looks: Looks, value: Callable[[Lengths], np.ndarray]
) -> None:
    for each, look in zip(lengths, looks, strict=True):
        heights = value(each)
        axes.plot(edges, np.append(heights, heights[-1]), drawstyle="steps-post", linewidth=1.8, **look)


def _documents(axes: Axes, lengths: Sequence[Lengths], edges: np.ndarray, looks: Looks) -> None:
    _steps(axes, lengths, edges, looks, lambda each: each.histogram(edges)[0] / each.documents)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(title="Documents by length", ylabel="share of the source's documents, per half octave", ylim=(0, None))


def _tokens(axes: Axes, lengths: Sequence[Lengths], edges: np.ndarray, looks: Looks) -> None:
    base = np.zeros(len(edges) - 1)
    for each, look in zip(lengths, looks, strict=True):
        tokens = each.histogram(edges)[1]
        axes.stairs(base + tokens, edges, baseline=base, fill=True, color=look["color"], alpha=0.85)
        base += tokens
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axes.set(title="Tokens by document length, sources stacked", ylabel="tokens, per half octave", ylim=(0, None))


def _at_least(axes: Axes, lengths: Sequence[Lengths], edges: np.ndarray, looks: Looks) -> None:
    for each, look in zip(lengths, looks, strict=True):
        shares = [each.at_least(edge).tokens / each.tokens for edge in edges.tolist()]
        axes.plot(edges, shares, linewidth=1.8, **look)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(title="Tokens in documents of at least this length", ylabel="share of the source's tokens", ylim=(0, 1.02))


def _ranks(axes: Axes, frequencies: Sequence[np.ndarray], looks: Looks) -> None:
    for counts, look in zip(frequencies, looks, strict=True):
        if len(counts):
            axes.plot(np.arange(1, len(counts) + 1), counts / counts.sum(), linewidth=1.8, **look)
    sampled = sum(int(counts.sum()) for counts in frequencies)
    axes.set(xscale="log", yscale="log", xlabel="rank of the token id", ylabel="share of the source's tokens")
    axes.set_title(f"Tokens by frequency, from a sample of {amount(sampled)} tokens")
    axes.grid(alpha=0.25)


def _length_axis(axes: Axes, edges: np.ndarray, shortest: int) -> None:
    axes.set_xscale("log", base=2)
    ticks = [1 << octave for octave in range(1, 32, 2) if shortest <= 1 << octave <= edges[-1]]  # the marks among them
    axes.set_xticks(ticks, labels=map(short_number, ticks))
    axes.minorticks_off()
    axes.set_xlim(shortest, float(edges[-1]))
    axes.set_xlabel("tokens of the document, EOS included")
    axes.grid(alpha=0.25)
    top = axes.get_xaxis_transform()
    for mark in MARKS:
        axes.axvline(mark, color="#555555", linewidth=1, linestyle=(0, (1, 2)))
        axes.text(mark, 0.985, f" {short_number(mark)}", transform=top, va="top", fontsize="small", color="#555555")


def amount(value: float) -> str:
    """A count, shortened: 950, 12.3k, 4.56M, 627B."""
    rounded = float(f"{value:.3g}")
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if rounded >= factor:
            return f"{rounded / factor:g}{unit}"
    return f"{rounded:g}"

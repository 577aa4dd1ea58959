"""The paper's perplexities at 1.3B parameters, to hold one's own against."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedCurve:
    """Perplexity by context, read off a figure (two decimals at best); `beyond`: what it says past the last context."""

    name: str
    perplexities: dict[int, float]
    beyond: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} 1.3B, paper's figure" + (f" ({self.beyond})" if self.beyond else "")

    @property
    def points(self) -> list[tuple[int, float]]:
        """(context, perplexity), shortest first."""
        return sorted(self.perplexities.items())


# arXiv 2407.14207: models of 1.3B parameters trained on SlimPajama at a context of 2048. Perplexity is per token of a
# 32000-piece vocabulary: another tokenizer's numbers stand beside it, but not against it.
PAPER = (
    PublishedCurve("Longhorn", {2048: 8.30, 4096: 8.29, 8192: 8.37, 16384: 8.36, 32768: 8.34}),
    PublishedCurve("Mamba", {2048: 8.43, 4096: 8.46, 8192: 8.43, 16384: 8.46, 32768: 8.42}),
    PublishedCurve("GLA", {2048: 9.34, 4096: 8.97, 8192: 9.16, 16384: 9.29, 32768: 9.38}),
    PublishedCurve("LLaMA", {2048: 7.86}, beyond="above 10 at longer contexts"),
)

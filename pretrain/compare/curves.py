"""Validation losses over tokens, and how many tokens a model needs to another's loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import orjson


@dataclass(frozen=True)
class Curve:
    """Validation losses in nats per token after so many training tokens, which ascend from above 0."""

    tokens: tuple[int, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip((0, *self.tokens), self.tokens, strict=False))
        if not self.tokens or len(self.tokens) != len(self.losses) or not ascending:
            raise ValueError(f"no curve: tokens {self.tokens}, losses {self.losses}")

    @property
    def final(self) -> float:
        return self.losses[-1]

    @property
    def lowest(self) -> float:
        return min(self.losses)

    def tokens_to(self, loss: float) -> float | None:
        """After how many tokens the lowest loss so far came to `loss`; None: it never did.

        Between two points the lowest loss so far is taken as linear in the logarithm of the tokens. The first point's
        tokens stand for all that comes before it.
        """
        so_far = list(accumulate(self.losses, min))
        i = next((i for i, reached in enumerate(so_far) if reached <= loss), None)
        if not i:
            return None if i is None else float(self.tokens[0])
        part = (so_far[i - 1] - loss) / (so_far[i - 1] - so_far[i])
        before, after = math.log(self.tokens[i - 1]), math.log(self.tokens[i])
        return math.exp(before + part * (after - before))


@dataclass(frozen=True)
class TokenRatio:
    """Tokens that two models need to the lowest loss that both reach, the worse one's best.

    `bound` is ">" where the reference was there at its first point already, so that it may need fewer tokens than
    `reference_tokens`; "<" where the other was; "?" where both were, and the ratio says nothing; else "".
    """

    loss: float
    reference_tokens: float
    other_tokens: float
    bound: str

    @property
    def ratio(self) -> float:
        """The other's tokens over the reference's: above 1 the reference learns from fewer."""
        return self.other_tokens / self.reference_tokens


def token_ratio(reference: Curve, other: Curve) -> TokenRatio:
    """How many times the reference's tokens the other needs to equal loss.

    A model that never reaches the other's lowest loss is not extrapolated: the loss is then its own lowest.
    """
    loss = max(reference.lowest, other.lowest)
    ours, theirs = reference.tokens_to(loss), other.tokens_to(loss)
    assert ours is not None and theirs is not None  # both reach it
    at_once = reference.losses[0] <= loss, other.losses[0] <= loss
    bound = {(True, False): ">", (False, True): "<", (True, True): "?"}.get(at_once, "")
    return TokenRatio(loss, ours, theirs, bound)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean loss at each point. Raises ValueError where the points are not the same."""
    if len({curve.tokens for curve in curves}) != 1:
        raise ValueError(f"curves over different tokens: {[curve.tokens for curve in curves]}")
    losses = tuple(math.fsum(at) / len(curves) for at in zip(*(curve.losses for curve in curves), strict=True))
    return Curve(curves[0].tokens, losses)


def read_curve(run_dir: Path, tokens_per_step: int) -> Curve:
    """The validation losses in a run's metrics.jsonl, inf where they were no number. Raises ValueError for none."""
    path = run_dir / "metrics.jsonl"
    losses = {
        record["step"] * tokens_per_step: math.inf if record["validation_loss"] is None else record["validation_loss"]
        for record in map(orjson.loads, path.read_bytes().splitlines())
        if "validation_loss" in record
    }
    if not losses:
        raise ValueError(f"{path}: no validation loss in it")
    return Curve(tuple(losses), tuple(losses.values()))

"""What came out: the runs' files read into one record, which the report and the plots are made from."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longhorn_layers.config import ModelConfig
from pretrain import checkpoint
from pretrain.compare.config import Comparison
from pretrain.compare.curves import Curve, TokenRatio, mean_curve, token_ratio
from pretrain.compare.runs import Run, evaluation_folder, grid_loss
from pretrain.evaluation.report import RESULT, Report
from pretrain.flops import flops_per_token


@dataclass(frozen=True)
class Perplexity:
    """Of one document set, at each context, one value a seed."""

    documents: str
    count: int
    contexts: dict[int, list[float]]

    def mean(self, context: int) -> float:
        """The geometric mean over the seeds: the exponential of the mean loss."""
        return math.exp(mean([math.log(value) for value in self.contexts[context]]))

    @property
    def ratios(self) -> list[float]:
        """By seed, the perplexity at the largest context over the smallest's."""
        return [
            large / small
            for small, large in zip(self.contexts[min(self.contexts)], self.contexts[max(self.contexts)], strict=True)
        ]


@dataclass(frozen=True)
class ModelResult:
    """One model's numbers; lists have one value a seed, in the comparison's order."""

    name: str
    model: ModelConfig
    parameters: int
    flops_per_token: float
    tokens_per_second: float
    lr: float
    grid: dict[float, float]  # learning rate → final validation loss
    curves: list[Curve]
    bits_per_byte: list[float]  # of all documents, at the smallest context
    perplexity: list[Perplexity]  # one a document set

    @property
    def finals(self) -> list[float]:
        return [curve.final for curve in self.curves]

    @property
    def mean_curve(self) -> Curve:
        return mean_curve(self.curves)

    def annealed(self, tokens: int) -> Curve:
        """The ends of its two schedules with the first seed: the grid's, of `tokens`, and the full one."""
        full = self.curves[0]
        if tokens >= full.tokens[-1]:
            return Curve(full.tokens[-1:], (full.final,))
        return Curve((tokens, full.tokens[-1]), (self.grid[self.lr], full.final))


@dataclass(frozen=True)
class Pair:
    """Another model against the reference."""

    other: str
    differences: list[float]  # by seed: the other's final loss − the reference's, same batches
    ratio: TokenRatio  # of the mean curves
    by_seed: list[TokenRatio]
    annealed: TokenRatio  # of the schedules' ends


@dataclass(frozen=True)
class Results:
    """Everything that the report says, but for how it was made."""

    reference: str
    models: dict[str, ModelResult]
    pairs: list[Pair]
    train_digest: str
    commits: list[str]  # that the trainings were made by

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        pairs = [
            {
                "other": pair.other,
                "loss_differences": pair.differences,
                "token_ratio": _ratio_dict(pair.ratio),
                "token_ratio_by_seed": [_ratio_dict(ratio) for ratio in pair.by_seed],
                "token_ratio_annealed": _ratio_dict(pair.annealed),
            }
            for pair in self.pairs
        ]
        return {
            "reference": self.reference,
            "train_digest": self.train_digest,
            "trained_by_commits": self.commits,
            "models": {name: _model_dict(model) for name, model in self.models.items()},
            "pairs": pairs,
        }


def _ratio_dict(ratio: TokenRatio) -> dict[str, Any]:
    return {"ratio": ratio.ratio, **asdict(ratio)}


def _model_dict(model: ModelResult) -> dict[str, Any]:
    return {
        "parameters": model.parameters,
        "flops_per_token": model.flops_per_token,
        "tokens_per_second": model.tokens_per_second,
        "learning_rate": model.lr,
        "grid": [{"lr": lr, "validation_loss": loss} for lr, loss in model.grid.items()],  # infinite: null
        "final_validation_losses": model.finals,
        "bits_per_byte": model.bits_per_byte,
        "curves": [{"tokens": curve.tokens, "losses": curve.losses} for curve in model.curves],
        "perplexity": [
            {"documents": found.documents, "contexts": {str(c): values for c, values in found.contexts.items()}}
            for found in model.perplexity
        ],
    }


def collect(comparison: Comparison, grid: Sequence[Run], full: Sequence[Run], speeds: dict[str, Any]) -> Results:
    """Read the finished runs' metrics, checkpoints and evaluations; `speeds` is speed.json's record."""
    models = {}
    for name in comparison.bases:
        own = [run for run in full if run.model == name]
        found = [Report.read(evaluation_folder(run, comparison) / RESULT) for run in own]
        models[name] = ModelResult(
            name=name,
            model=comparison.bases[name].model,
            parameters=comparison.parameters[name],
            flops_per_token=flops_per_token(comparison.bases[name].model, comparison.base.data.seqlen),
            tokens_per_second=speeds["models"][name]["tokens_per_second"],
            lr=own[0].lr,
            grid={run.lr: grid_loss(run) for run in grid if run.model == name},
            curves=[run.curve() for run in own],
            bits_per_byte=[report.rows()[0]["bits_per_byte"] for report in found],
            perplexity=_perplexities(found),
        )
    reference = models[comparison.reference]
    pairs = [compare_pair(reference, models[name], grid[0].tokens) for name in comparison.others]
    manifests = [checkpoint.read_manifest(checkpoint.resolve(run.folder)) for run in full]
    (digest,) = {manifest.identity["data"]["train_digest"] for manifest in manifests}
    return Results(reference.name, models, pairs, digest, sorted({manifest.commit for manifest in manifests}))


def _perplexities(found: list[Report]) -> list[Perplexity]:
    """Of evaluations, one a seed: by document set."""
    perplexities = []
    for sets in zip(*(report.sets for report in found), strict=True):
        by_context: dict[int, list[float]] = {}
        for result in (result for one in sets for result in one.contexts):
            by_context.setdefault(result.context, []).append(result.perplexity)
        perplexities.append(Perplexity(sets[0].name, sets[0].documents, by_context))
    return perplexities


def compare_pair(reference: ModelResult, other: ModelResult, grid_tokens: int) -> Pair:
    return Pair(
        other.name,
        [theirs - ours for ours, theirs in zip(reference.finals, other.finals, strict=True)],
        token_ratio(reference.mean_curve, other.mean_curve),
        [token_ratio(ours, theirs) for ours, theirs in zip(reference.curves, other.curves, strict=True)],
        token_ratio(reference.annealed(grid_tokens), other.annealed(grid_tokens)),
    )


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

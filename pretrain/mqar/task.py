"""The data of multi-query associative recall.

A sequence is pairs of a key and its value, then every key once more, between filler tokens: at such a query the model
is to name the key's value. With keys 2 and 4, values 8 and 7:

    inputs   2 8 4 7 0 0 4 0 0 0 2 0
    targets  . . . . . . 7 . . . 8 .      (. is not scored)

As in Arora et al. (arXiv 2312.04927, appendix E, and their code, whose defaults these are): keys are of the lower half
of the vocabulary and values of the upper, each at most once in a sequence; a query lies an even number of tokens after
the pairs, `2·gap` with P(gap) ∝ (gap + 1)^(power − 1), no gap twice, so that a small power puts most queries early.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FILLER = 0
NOT_SCORED = -100  # as a target
TRAIN, TEST = 0, 1  # which examples: a generator of its own for each


@dataclass
class TaskConfig:
    """One difficulty of the task, and how many sequences an optimizer step has there."""

    seqlen: int = 64
    pairs: int = 4
    batch_size: int = 512


@dataclass(frozen=True)
class Examples:
    """`inputs` and `targets`, (examples, seqlen) int64; targets are −100 but at the queries."""

    inputs: Tensor
    targets: Tensor


def make_examples(task: TaskConfig, vocab_size: int, count: int, power: float, seed: int, part: int) -> Examples:
    """`count` sequences; the same arguments make the same ones. `part` is TRAIN or TEST.

    Raises ValueError, naming the numbers, where the task has no room for its pairs.
    """
    check_room(task, vocab_size)
    rng = np.random.default_rng([seed, part])
    half, start = vocab_size // 2, 2 * task.pairs
    keys = 1 + _distinct(rng, count, half - 1, task.pairs)
    values = half + _distinct(rng, count, vocab_size - half, task.pairs)
    inputs = np.full((count, task.seqlen), FILLER)
    inputs[:, 0:start:2], inputs[:, 1:start:2] = keys, values
    queries = start + 2 * _gaps(rng, count, (task.seqlen - start) // 2, task.pairs, power)
    np.put_along_axis(inputs, queries, keys, axis=1)
    targets = np.full_like(inputs, NOT_SCORED)
    np.put_along_axis(targets, queries, values, axis=1)
    return Examples(torch.from_numpy(inputs), torch.from_numpy(targets))


def check_room(task: TaskConfig, vocab_size: int) -> None:
    """Raise ValueError where pairs and their queries don't fit the sequence, or keys don't fit the vocabulary."""
    if task.pairs < 1 or 4 * task.pairs > task.seqlen:
        raise ValueError(
            f"{task.pairs} pairs in {task.seqlen} tokens: there must be at least 1, and 4 tokens for each "
            "(key, value, query, filler)"
        )
    if task.pairs > vocab_size // 2 - 1:
        raise ValueError(
            f"{task.pairs} pairs in a vocabulary of {vocab_size}: keys are of its lower half without token {FILLER}, "
            f"so it must be at least {2 * task.pairs + 2}"
        )


def _distinct(rng: np.random.Generator, rows: int, choices: int, count: int) -> np.ndarray:
    """(rows, count) of range(choices), none twice in a row, every selection and order as likely (Floyd's method)."""
    drawn = np.empty((rows, count), dtype=np.int64)
    for column, top in enumerate(range(choices - count, choices)):
        candidate = rng.integers(top + 1, size=rows)
        taken = (drawn[:, :column] == candidate[:, None]).any(axis=1)
        drawn[:, column] = np.where(taken, top, candidate)
    return rng.permuted(drawn, axis=1)


def _gaps(rng: np.random.Generator, rows: int, room: int, count: int, power: float) -> np.ndarray:
    """(rows, count) of range(room) in the order drawn, none twice in a row, with P(gap) ∝ (gap + 1)^(power − 1).

    The largest of log-weights with Gumbel noise are a weighted draw without replacement.
    """
    scores = (power - 1) * np.log(np.arange(1, room + 1)) + rng.gumbel(size=(rows, room))
    return np.argsort(-scores, axis=1)[:, :count]

"""Cross-entropy, of logits and of hidden states: the latter never holds all logits at once."""

from kernels.cross_entropy.chunked import BACKENDS, VocabShard, linear_cross_entropy
from kernels.cross_entropy.reference import cross_entropy

__all__ = ["BACKENDS", "VocabShard", "cross_entropy", "linear_cross_entropy"]

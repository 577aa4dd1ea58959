"""What both CPU engines are given: the inputs, and which sequences walk which steps."""

from typing import NamedTuple

from torch import Tensor

from kernels.scan.sequences import CHUNK, Sequences

__all__ = ["CHUNK", "Gradients", "Inputs", "Sequences"]


class Inputs(NamedTuple):
    """`longhorn_scan`'s tensors: streams in their own dtype, D, dt_bias and the state in the dtype computed in."""

    u: Tensor
    dt: Tensor
    q: Tensor
    k: Tensor
    D: Tensor
    dt_bias: Tensor
    z: Tensor | None
    initial_state: Tensor | None


# One gradient for each input, None where the input is None.
Gradients = Inputs

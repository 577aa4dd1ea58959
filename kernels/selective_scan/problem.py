"""What both CPU engines are given."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """`selective_scan`'s tensors: streams in their own dtype, the others in the dtype computed in."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    z: Tensor | None
    initial_state: Tensor | None


# One gradient for each input, None where the input is None.
Gradients = Inputs

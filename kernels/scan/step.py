"""Which rows of a state a decode step advances."""

from collections.abc import Callable

from torch import Tensor


def advance_rows(
    state: Tensor, state_indices: Tensor | None, advance: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Put `advance(rows) -> (rows, y)` into `state` and return y.

    state_indices, int (batch,): the row of `state` that each token belongs to, each row at most once; −1 stands
    for no row: its y is 0 and no state changes. Without it, token i belongs to row i.
    """
    if state_indices is None:
        rows, y = advance(state)
        state.copy_(rows)
        return y
    rows, y = advance(state[state_indices.clamp(min=0)])
    active = state_indices >= 0
    state[state_indices[active]] = rows[active]
    return y.masked_fill(~active.unsqueeze(-1), 0)

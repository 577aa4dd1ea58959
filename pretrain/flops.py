"""Floating-point operations of training, counted from the model's shapes: what MFU is measured in.

Per token, forward and backward, with N_matmul the weights that a token is multiplied with:

    flops = 6·N_matmul + n_layer·d_inner·d_state·(7 + 15)           exact update: 7 + 12

N_matmul: in_proj, x_proj, dt_head and out_proj of each layer, and the head, tied or not. Looking up
an embedding is no matmul. A multiply-add is two operations; the backward has two matmuls for the
forward's one.

The scan, by DESIGN §2's formulas, operations per channel d and state n:

    forward     k·S and its difference to u (exact: its sum over n) 2, eps·k 1, S += 2, Σ S·q 2
    backward    g = G + dy·q 2, g·k 1, deps 2, du 1, dk = Σ_d eps·(g·r − gk·S₋) 5,
                G = g − eps·k·gk 2, dq 2
      exact     g 2, gk = Σ_n g·k 2, dk 4, G 2, dq 2 (r and gk, and so deps and du, have no n)

Not counted: operations per channel alone (eps, D·u, the gate), norms, the short convolution, SiLU,
softmax. What a kernel or activation checkpointing computes twice is work done, not work that the
model needs: `recomputed_flops_per_token` has it, apart.
"""

from longhorn_layers.config import LonghornConfig, ModelConfig

SCAN_FORWARD = 7
SCAN_BACKWARD = {"diagonal": 15, "exact": 12}
# The Triton backward walks each stretch between kept states again (5: no output), and once more group by group (5),
# then needs each step's residual (2), and Σ S·q for the gate's gradient (2).
SCAN_REBUILD = 14


def matmul_parameters_per_layer(model: ModelConfig) -> int:
    """Weights of one layer's linears.

    Raises ValueError for a mixer whose operations are not counted here.
    """
    mixer = _longhorn(model)
    d_inner, dt_rank = mixer.expand * model.d_model, mixer.resolved_dt_rank(model.d_model)
    projections = 3 * model.d_model + (dt_rank + 2 * mixer.d_state) + dt_rank  # in and out, x_proj, dt_head
    return d_inner * projections


def head_parameters(model: ModelConfig) -> int:
    """Weights of the head's matmul, without the vocabulary's padding."""
    return model.vocab_size * model.d_model


def flops_per_token(model: ModelConfig) -> float:
    """FLOPs to train on one token, forward and backward, nothing recomputed (the module's formula).

    Raises ValueError for a mixer whose operations are not counted here.
    """
    return matmul_flops_per_token(model) + scan_flops_per_token(model)


def matmul_flops_per_token(model: ModelConfig) -> float:
    """6·N_matmul, head included."""
    return 6.0 * (model.n_layer * matmul_parameters_per_layer(model) + head_parameters(model))


def scan_flops_per_token(model: ModelConfig) -> float:
    """The recurrence of all layers, forward and backward."""
    return float(_scan_elements(model) * (SCAN_FORWARD + SCAN_BACKWARD[_longhorn(model).update]))


def recomputed_flops_per_token(model: ModelConfig, activation_checkpointing: bool) -> float:
    """FLOPs done twice: the scan's states; with checkpointing, each block's forward."""
    states = float(_scan_elements(model) * SCAN_REBUILD)
    if not activation_checkpointing:
        return states
    linears = 2.0 * model.n_layer * matmul_parameters_per_layer(model)
    return states + linears + _scan_elements(model) * SCAN_FORWARD


def _scan_elements(model: ModelConfig) -> int:
    mixer = _longhorn(model)
    return model.n_layer * mixer.expand * model.d_model * mixer.d_state


def _longhorn(model: ModelConfig) -> LonghornConfig:
    if not isinstance(model.mixer, LonghornConfig):
        raise ValueError(f"model.mixer.name: the FLOPs of {model.mixer.name!r} are not counted; longhorn's are")
    return model.mixer

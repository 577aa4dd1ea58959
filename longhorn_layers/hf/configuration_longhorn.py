"""Configuration of the Longhorn language model for transformers (arXiv 2407.14207)."""

from typing import Any, Literal

from transformers import PreTrainedConfig


class LonghornConfig(PreTrainedConfig):
    """Shape and special tokens of a Longhorn language model.

    vocab_size: tokens, with no padding.
    hidden_size: width of the residual stream; the mixers' inner width is `expand * hidden_size`.
    state_size: numbers kept per inner channel (N).
    conv_kernel: taps of the causal convolution.
    time_step_rank: rank of the step-size projection; None means ceil(hidden_size / 16).
    mlp_size: inner width of a SwiGLU after each mixer; 0 means none.
    update_rule: "diagonal", the paper's closed form with its rank-one term replaced by its
        diagonal, or "exact", the same with no approximation.

    Raises ValueError for an unknown `update_rule`.
    """

    model_type = "longhorn"
    keys_to_ignore_at_inference = ["cache_params"]

    vocab_size: int = 32000
    hidden_size: int = 256
    num_hidden_layers: int = 4
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | None = None
    mlp_size: int = 0
    norm_eps: float = 1e-5
    # Not `update`, which is a method of every configuration.
    update_rule: Literal["diagonal", "exact"] = "diagonal"
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        rule = self.update_rule
        if rule not in ("diagonal", "exact"):
            raise ValueError(f'config: update_rule is {rule!r}, must be "diagonal" or "exact"')
        if self.time_step_rank is None:
            self.time_step_rank = -(-self.hidden_size // 16)
        super().__post_init__(**kwargs)

    @property
    def intermediate_size(self) -> int:
        return self.expand * self.hidden_size

    @property
    def layer_types(self) -> list[str]:
        # DynamicCache reads this and builds a convolution and a recurrent state per layer.
        return ["linear_attention"] * self.num_hidden_layers

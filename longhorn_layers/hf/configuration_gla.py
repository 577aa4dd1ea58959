"""Configuration of the GLA language model (gated linear attention, arXiv 2312.06635) for transformers."""

from typing import Any

from transformers import PreTrainedConfig


class GLAConfig(PreTrainedConfig):
    """Shape and special tokens of a GLA language model.

    vocab_size: tokens, with no padding.
    hidden_size: width of the residual stream.
    num_heads: heads of a mixer, each with a state of its own.
    expand_k, expand_v: width of all heads' keys and of all heads' values, as multiples of hidden_size.
    gate_rank: rank of the decay's projection.
    gate_normalizer: the decay is a sigmoid to the power of 1 / gate_normalizer.
    mlp_size: inner width of a SwiGLU after each mixer; 0 means none.

    Raises ValueError where the keys or the values don't divide among the heads.
    """

    # Not "gla": flash-linear-attention registers that for other parameter names.
    model_type = "longhorn_gla"
    keys_to_ignore_at_inference = ["cache_params"]

    vocab_size: int = 32000
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    mlp_size: int = 0
    norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, width in (("expand_k", self.key_size), ("expand_v", self.value_size)):
            if width % self.num_heads:
                raise ValueError(
                    f"config: {name} * hidden_size = {width}, must be a multiple of {self.num_heads} heads"
                )
        super().__post_init__(**kwargs)

    @property
    def key_size(self) -> int:
        """Of all heads together."""
        return round(self.expand_k * self.hidden_size)

    @property
    def value_size(self) -> int:
        return round(self.expand_v * self.hidden_size)

    @property
    def layer_types(self) -> list[str]:
        # DynamicCache reads this and builds a layer that holds a recurrent state.
        return ["linear_attention"] * self.num_hidden_layers

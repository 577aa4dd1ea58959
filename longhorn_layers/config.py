"""What a model is made of. Sizes are counts; `None` stands for the rule beside it."""

from dataclasses import dataclass, field

VOCAB_MULTIPLE = 128  # whatever the tensor-parallel size: a checkpoint then fits any of them


@dataclass
class MixerConfig:
    """Base of the mixers' configs; `name` is a key of `longhorn_layers.registry.MIXERS`."""

    name: str = "longhorn"


@dataclass
class ScanMixerConfig(MixerConfig):
    """Mamba-1's block shape: what Longhorn and Mamba share (longhorn_layers/scan_mixer.py)."""

    d_state: int = 16
    d_conv: int = 4
    expand: int = 2  # d_inner = expand · d_model
    dt_rank: int | None = None  # ceil(d_model / 16)

    def resolved_dt_rank(self, d_model: int) -> int:
        return self.dt_rank if self.dt_rank is not None else -(-d_model // 16)


@dataclass
class LonghornConfig(ScanMixerConfig):
    """The Longhorn mixer (DESIGN §2; the authors' block)."""

    name: str = "longhorn"
    update: str = "diagonal"  # the paper's; or "exact"


@dataclass
class MambaConfig(ScanMixerConfig):
    """Mamba-1 (arXiv 2312.00752)."""

    name: str = "mamba"


@dataclass
class GLAConfig(MixerConfig):
    """Gated linear attention (arXiv 2312.06635, section 4.4): its layer has a SwiGLU, `ModelConfig.d_ff`."""

    name: str = "gla"
    n_head: int = 4
    expand_k: float = 0.5  # all heads' keys = expand_k · d_model
    expand_v: float = 1.0  # all heads' values = expand_v · d_model
    gate_rank: int = 16
    gate_normalizer: float = 16.0  # the decay is sigmoid(…) to the power of 1/16: slow at first


@dataclass
class AttentionConfig(MixerConfig):
    """Causal softmax attention with rotary positions: with a SwiGLU (`ModelConfig.d_ff`) LLaMA's layer."""

    name: str = "attention"
    head_dim: int = 64
    rope_theta: float = 10_000.0


@dataclass
class ModelConfig:
    """A language model: embedding, n_layer blocks of norm and mixer (and SwiGLU), final norm, head."""

    mixer: MixerConfig = field(default_factory=LonghornConfig)
    vocab_size: int = 32000
    d_model: int = 256
    n_layer: int = 4
    d_ff: int = 0  # width of a SwiGLU after each mixer; 0: none, as in Longhorn and Mamba, which gate inside the mixer
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128; the logits of the padding are −inf."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def residual_writes(self) -> int:
        """How many times a model adds to its residual stream: what projections onto it are scaled down by."""
        return self.n_layer * (2 if self.d_ff else 1)

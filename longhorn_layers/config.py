"""What a model is made of. Sizes are counts; `None` stands for the rule beside it."""

from dataclasses import dataclass, field

VOCAB_MULTIPLE = 128  # whatever the tensor-parallel size: a checkpoint then fits any of them


@dataclass
class MixerConfig:
    """Base of the mixers' configs; `name` is a key of `longhorn_layers.registry.MIXERS`."""

    name: str = "longhorn"


@dataclass
class LonghornConfig(MixerConfig):
    """The Longhorn mixer (DESIGN §2; the authors' block, whose shape is Mamba-1's)."""

    name: str = "longhorn"
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2  # d_inner = expand · d_model
    dt_rank: int | None = None  # ceil(d_model / 16)
    update: str = "diagonal"  # the paper's; or "exact"

    def resolved_dt_rank(self, d_model: int) -> int:
        return self.dt_rank if self.dt_rank is not None else -(-d_model // 16)


@dataclass
class ModelConfig:
    """A language model: embedding, n_layer blocks of norm and mixer, final norm, head."""

    mixer: MixerConfig = field(default_factory=LonghornConfig)
    vocab_size: int = 32000
    d_model: int = 256
    n_layer: int = 4
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 128; the logits of the padding are −inf."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

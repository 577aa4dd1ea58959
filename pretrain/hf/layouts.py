"""Where other codes keep each parameter: there and back, with every name, shape and dtype checked."""

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from longhorn_layers.config import ModelConfig, ScanMixerConfig
from longhorn_layers.model import LanguageModel
from pretrain.hf import ConversionError

EMBEDDING, HEAD = "embedding.weight", "head.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what fp32 holds exactly
LISTED = 5  # names in a message; there may be thousands
BLOCK = re.compile(r"blocks\.(\d+)\.")


def canonical(config: ModelConfig) -> ModelConfig:
    """The same model with dt_rank left to the rule where that gives it: as a config is mostly written."""
    mixer = config.mixer
    if isinstance(mixer, ScanMixerConfig):
        by_rule = replace(mixer, dt_rank=None)
        if by_rule.resolved_dt_rank(config.d_model) == mixer.dt_rank:
            mixer = by_rule
    return replace(config, mixer=mixer)


def shipped_name(ours: str) -> str:
    """In the code that exports ship, which keeps our names."""
    return "lm_head.weight" if ours == HEAD else f"model.{ours}"


def by_table(names: Mapping[str, str]) -> Callable[[str], str]:
    """Names by a table, ours → theirs, `{}` for the number of the layer; ConversionError for one that it lacks."""

    def name(ours: str) -> str:
        block = BLOCK.match(ours)
        known = f"blocks.{{}}.{ours[block.end() :]}" if block else ours
        if known not in names:
            raise ConversionError(f"{ours} has no place in that layout")
        return names[known].format(*block.groups() if block else ())

    return name


def backbone_names(embedding: str, dt: str) -> dict[str, str]:
    """The table of Mamba's authors' layout, which transformers' Mamba and Longhorn's authors vary in two names."""
    mixer = {
        **{f"{name}.weight": f"{name}.weight" for name in ("in_proj", "x_proj", "out_proj")},
        **{name: name for name in ("A_log", "D")},
        **{f"conv.{name}": f"conv1d.{name}" for name in ("weight", "bias")},
        "dt_head.weight": f"{dt}.weight",
        "dt_bias": f"{dt}.bias",
    }
    return {
        "embedding.weight": f"backbone.{embedding}.weight",
        "blocks.{}.norm.weight": "backbone.layers.{}.norm.weight",
        **{f"blocks.{{}}.mixer.{ours}": f"backbone.layers.{{}}.mixer.{theirs}" for ours, theirs in mixer.items()},
        "norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
    }


def llama_names() -> dict[str, str]:
    """The table of transformers' LLaMA."""
    layer = {
        "norm": "input_layernorm",
        **{f"mixer.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")},
        "mixer.out_proj": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        **{f"mlp.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    }
    return {
        "embedding.weight": "model.embed_tokens.weight",
        **{f"blocks.{{}}.{ours}.weight": f"model.layers.{{}}.{theirs}.weight" for ours, theirs in layer.items()},
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }


@dataclass(frozen=True)
class Layout:
    """Another code's names for our parameters; a `conv1d` of theirs has an axis of 1 in the middle.

    `name`: of a parameter of ours. `ignored`: ends of names that hold nothing learned.
    """

    name: Callable[[str], str]
    ignored: tuple[str, ...] = ()

    def write(self, model: LanguageModel) -> dict[str, Tensor]:
        """The model's own weights under their names, without the padding of the vocabulary."""
        written = {}
        for ours, parameter in model.named_parameters():
            theirs, weight = self.name(ours), parameter.detach()
            if ours in (EMBEDDING, HEAD):
                weight = weight[: model.config.vocab_size]
            written[theirs] = weight.unsqueeze(1) if _is_conv(theirs) else weight
        return written

    def read(
        self, weights: Mapping[str, Tensor], config: ModelConfig, source: Path, rows: int | None = None
    ) -> LanguageModel:
        """The model of `config` with these weights, fp32 in host memory, the padding of its vocabulary zero.

        Args:
            weights: by their names, of any dtype that fp32 holds exactly.
            source: the file or folder, for messages.
            rows: of their vocabulary, where it is padded too; those from `config.vocab_size` on are dropped.

        Raises ConversionError: names that are missing or too many, other shapes or dtypes, a head that should be
            tied to the embedding and differs from it, numbers that are not finite.
        """
        with torch.device("meta"):
            model = LanguageModel(config)
        places = {self.name(ours): (ours, weight.shape) for ours, weight in model.named_parameters()}
        found = {name: weight for name, weight in weights.items() if not name.endswith(self.ignored)}
        if config.tie_embeddings:
            _drop_tied_head(found, self.name(HEAD), self.name(EMBEDDING), source)
        _check_names(found.keys(), places.keys(), source)
        read = {}
        for theirs, (ours, shape) in places.items():
            in_vocabulary = ours in (EMBEDDING, HEAD)
            wanted = [rows or config.vocab_size, *shape[1:]] if in_vocabulary else list(shape)
            weight = _checked(found[theirs], wanted, theirs, source)
            read[ours] = _padded(weight[: config.vocab_size], shape[0]) if in_vocabulary else weight
        return _assemble(model, read)


def _is_conv(theirs: str) -> bool:
    return theirs.endswith("conv1d.weight")


def _drop_tied_head(found: dict[str, Tensor], head: str, embedding: str, source: Path) -> None:
    """Files may hold it twice; then both must be the same."""
    weight = found.pop(head, None)
    if weight is not None and embedding in found and not torch.equal(weight, found[embedding]):
        raise ConversionError(
            f"{source}: {head} should be {embedding}, tied to it by the config, but is another matrix"
        )


def _check_names(found: Set[str], wanted: Set[str], source: Path) -> None:
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:LISTED])}{', …' if len(names) > LISTED else ''}"
        for kind, names in (("missing", wanted - found), ("unexpected", found - wanted))
        if names
    ]
    if problems:
        raise ConversionError(f"{source}: not the parameters that its config describes: {'; '.join(problems)}")


def _checked(weight: Tensor, shape: list[int], theirs: str, source: Path) -> Tensor:
    expected = [shape[0], 1, *shape[1:]] if _is_conv(theirs) else shape
    if list(weight.shape) != expected:
        raise ConversionError(f"{source}: {theirs} is {list(weight.shape)}, by the config it must be {expected}")
    if weight.dtype not in FLOATS:
        raise ConversionError(f"{source}: {theirs} is {weight.dtype}, must be float32, bfloat16 or float16")
    if not weight.isfinite().all():
        raise ConversionError(f"{source}: {theirs} holds numbers that are not finite")
    return weight.float().reshape(shape)


def _padded(weight: Tensor, rows: int) -> Tensor:
    return torch.cat([weight, weight.new_zeros(rows - len(weight), weight.shape[1])])


def _assemble(model: LanguageModel, weights: dict[str, Tensor]) -> LanguageModel:
    tied = model.config.tie_embeddings
    model.load_state_dict(weights | ({HEAD: weights[EMBEDDING]} if tied else {}), assign=True)
    if tied:
        model.head.weight = model.embedding.weight
    return model.eval()

"""Turn a plain model into its tensor-parallel shard, by a plan per mixer.

The plain model is built in full on every rank from the same seed, then each rank keeps its part: weights do not
depend on the tensor-parallel size. Every sharded parameter carries megatron-core's marks (`tensor_model_parallel`,
`partition_dim`, `partition_stride`) and no replicated one does: DeepSpeed's gradient norm and our checkpoints read
them. Unmarked shards train silently wrong (DESIGN §10), so `audit` compares marks with shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from kernels.cross_entropy import VocabShard, linear_cross_entropy
from kernels.rms_norm import rms_norm
from longhorn_layers.config import ModelConfig
from longhorn_layers.model import LanguageModel, LMHead
from longhorn_layers.norm import HeadNorm
from pretrain.config import ConfigError
from pretrain.parallel.mesh import Mesh


def shard_tensor(full: Tensor, dim: int, stride: int, rank: int, size: int) -> Tensor:
    """Rank's part of `full`: cut along `dim` into `stride` sections, each of them into `size` parts.

    stride 2 is in_proj's: rank i gets [x_i | z_i], so that halving its output still separates x from z.
    """
    return torch.cat([section.chunk(size, dim)[rank] for section in full.chunk(stride, dim)], dim).contiguous()


def unshard_tensors(shards: list[Tensor], dim: int, stride: int) -> Tensor:
    """The inverse of `shard_tensor`, from every rank's part in order."""
    sections = zip(*(shard.chunk(stride, dim) for shard in shards), strict=True)
    return torch.cat([part for section in sections for part in section], dim)


def shard_parameter(full: Tensor, mesh: Mesh, dim: int, stride: int = 1) -> nn.Parameter:
    """This rank's part as a parameter with megatron-core's marks."""
    if full.shape[dim] % (mesh.tensor_size * stride):
        raise ConfigError(f"a dimension of {full.shape[dim]} is not divisible by {mesh.tensor_size} tensor ranks")
    part = nn.Parameter(shard_tensor(full.detach(), dim, stride, mesh.tensor_rank, mesh.tensor_size))
    set_tensor_model_parallel_attributes(part, True, dim, stride)
    return part


@dataclass(frozen=True)
class Sharding:
    """How a parameter is cut over tensor ranks: `shape` is one rank's part; dim None: every rank holds it whole."""

    shape: list[int]
    dim: int | None
    stride: int


def sharding_of(parameter: Any) -> Sharding:
    """Read off megatron-core's marks; ZeRO-3 keeps the shape of what it has cut further in `ds_shape`."""
    shape = list(getattr(parameter, "ds_shape", parameter.shape))
    if getattr(parameter, "tensor_model_parallel", False):
        return Sharding(shape, parameter.partition_dim, parameter.partition_stride)
    return Sharding(shape, None, 1)


class ColumnParallelLinear(nn.Module):
    """Replicated input, each rank some of the output's columns; the input's gradient is summed over ranks."""

    def __init__(self, linear: nn.Linear, mesh: Mesh, stride: int = 1) -> None:
        super().__init__()
        self.weight = shard_parameter(linear.weight, mesh, dim=0, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(copy_to_tensor_model_parallel_region(x), self.weight)


class RowParallelLinear(nn.Module):
    """Each rank some of the input's columns; the output is summed over ranks, and so replicated."""

    def __init__(self, linear: nn.Linear, mesh: Mesh) -> None:
        super().__init__()
        self.weight = shard_parameter(linear.weight, mesh, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from_tensor_model_parallel_region(F.linear(x, self.weight))


class RowThenColumnLinear(RowParallelLinear):
    """A row-parallel linear whose output every rank uses for its own channels, like x_proj's dt, k and q.

    Each rank then sees only its channels' part of the output's gradient; without the copy, whose backward sums
    them, x_proj's gradient is 58–70% wrong while the loss looks the same (DESIGN §10).
    """

    def forward(self, x: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(super().forward(x))


def share_input(module: nn.Module) -> None:
    """Let linears that are cut over their outputs read one input: its gradient is summed over ranks once, not by each.

    `module`'s first argument is then the same on every rank forward, and each rank's own part of the gradient backward:
    what is inside and not cut must hand its own gradient on to `copy_to_tensor_model_parallel_region`, as below.
    """
    module.register_forward_pre_hook(lambda _, inputs: (copy_to_tensor_model_parallel_region(inputs[0]), *inputs[1:]))


class SharedLinear(nn.Module):
    """A linear that every rank holds whole, for its own heads: the weight's gradient is summed over ranks."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, copy_to_tensor_model_parallel_region(self.weight))


class SharedHeadNorm(nn.Module):
    """A norm with one weight for all heads, of which each rank has some: the weight's gradient is summed over ranks."""

    def __init__(self, norm: HeadNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        weight = copy_to_tensor_model_parallel_region(self.weight)
        return rms_norm(x, weight, eps=self.eps)  # type: ignore[return-value]  # one tensor: there is no residual


class VocabParallelEmbedding(nn.Module):
    """Each rank holds a range of the vocabulary; the others' rows come by the sum."""

    def __init__(self, embedding: nn.Embedding, mesh: Mesh) -> None:
        super().__init__()
        self.weight = shard_parameter(embedding.weight, mesh, dim=0)
        self.first = mesh.tensor_rank * (embedding.num_embeddings // mesh.tensor_size)
        self.count = embedding.num_embeddings // mesh.tensor_size

    def forward(self, input_ids: Tensor) -> Tensor:
        local = input_ids - self.first
        elsewhere = (local < 0) | (local >= self.count)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_tensor_model_parallel_region(rows.masked_fill(elsewhere.unsqueeze(-1), 0))


class VocabParallelHead(nn.Module):
    """Each rank's logits are a range of the vocabulary, made for some tokens at a time; the softmax runs over all."""

    def __init__(self, head: LMHead, mesh: Mesh) -> None:
        super().__init__()
        self.weight = shard_parameter(head.weight, mesh, dim=0)
        self.vocab_size = head.vocab_size  # of all ranks: words from here on are padding
        self.first = mesh.tensor_rank * self.weight.shape[0]
        self.mesh = mesh

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, reduction: Literal["sum", "none"] = "sum"
    ) -> Tensor:
        if targets is None:
            raise NotImplementedError("logits under tensor parallelism; load the checkpoint on one device instead")
        # The gradient that each rank's words give hidden is summed over ranks by the copy's backward.
        hidden = copy_to_tensor_model_parallel_region(hidden.to(self.weight.dtype))
        return linear_cross_entropy(
            hidden,
            self.weight,
            targets,
            vocab_size=self.vocab_size,
            reduction=reduction,
            shard=VocabShard(self.first, self._gather),
        )

    def _gather(self, statistics: Tensor) -> Tensor:
        """All ranks' statistics, stacked; gloo takes them only end to end."""
        gathered = statistics.new_empty(self.mesh.tensor_size * len(statistics), *statistics.shape[1:])
        dist.all_gather_into_tensor(gathered, statistics, group=self.mesh.tensor_group)
        return gathered.unflatten(0, (self.mesh.tensor_size, -1))


Plan = Callable[[Any, Mesh], None]


def shard_longhorn(mixer: Any, mesh: Mesh) -> None:
    """Everything over d_inner is cut, dt_low, k and q are replicated (DESIGN §7)."""
    mixer.in_proj = ColumnParallelLinear(mixer.in_proj, mesh, stride=2)
    mixer.conv.weight = shard_parameter(mixer.conv.weight, mesh, dim=0)
    mixer.conv.bias = shard_parameter(mixer.conv.bias, mesh, dim=0)
    mixer.x_proj = RowThenColumnLinear(mixer.x_proj, mesh)
    # A plain matmul on the copied dt_low: a ColumnParallelLinear would sum its gradient a second time.
    _cut_outputs(mesh, mixer.dt_head)
    mixer.dt_bias = shard_parameter(mixer.dt_bias, mesh, dim=0)
    mixer.D = shard_parameter(mixer.D, mesh, dim=0)
    mixer.out_proj = RowParallelLinear(mixer.out_proj, mesh)


def shard_mamba(mixer: Any, mesh: Mesh) -> None:
    """Longhorn's plan, as dt_low, B and C are its dt_low, k and q; the rates are by channel too."""
    shard_longhorn(mixer, mesh)
    mixer.A_log = shard_parameter(mixer.A_log, mesh, dim=0)


def shard_gla(mixer: Any, mesh: Mesh) -> None:
    """Each rank has some heads, with their keys' decays; the decay's narrow projection is whole on every rank."""
    _check_heads(len(mixer.decay_bias) // mixer.key_dim, mesh)
    share_input(mixer)
    _cut_outputs(mesh, mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, mixer.decay_up)
    mixer.decay_down = SharedLinear(mixer.decay_down)
    mixer.decay_bias = shard_parameter(mixer.decay_bias, mesh, dim=0)
    mixer.norm = SharedHeadNorm(mixer.norm)
    mixer.out_proj = RowParallelLinear(mixer.out_proj, mesh)


def shard_attention(mixer: Any, mesh: Mesh) -> None:
    """Each rank has some heads."""
    _check_heads(mixer.q_proj.out_features // mixer.head_dim, mesh)
    share_input(mixer)
    _cut_outputs(mesh, mixer.q_proj, mixer.k_proj, mixer.v_proj)
    mixer.out_proj = RowParallelLinear(mixer.out_proj, mesh)


def shard_mlp(mlp: Any, mesh: Mesh) -> None:
    """Each rank has some of the SwiGLU's inner channels."""
    share_input(mlp)
    _cut_outputs(mesh, mlp.gate_proj, mlp.up_proj)
    mlp.down_proj = RowParallelLinear(mlp.down_proj, mesh)


def _cut_outputs(mesh: Mesh, *linears: nn.Linear) -> None:
    """Plain matmuls of this rank's outputs: their input's gradient is summed by whoever made the input."""
    for linear in linears:
        linear.weight = shard_parameter(linear.weight, mesh, dim=0)


def _check_heads(heads: int, mesh: Mesh) -> None:
    if heads % mesh.tensor_size:
        raise ConfigError(f"{heads} heads do not divide among {mesh.tensor_size} tensor ranks")


PLANS: dict[str, Plan] = {
    "longhorn": shard_longhorn,
    "mamba": shard_mamba,
    "gla": shard_gla,
    "attention": shard_attention,
}


def shard_model(model: LanguageModel, mesh: Mesh) -> LanguageModel:
    """Replace `model`'s parameters and linears by this rank's, in place; a mesh without tensor ranks changes nothing.

    Raises ValueError where the mixer has no plan or a dimension does not divide.
    """
    if mesh.tensor_size == 1:
        return model
    config = model.config
    if config.mixer.name not in PLANS:
        raise ConfigError(f"mixer {config.mixer.name!r} has no tensor-parallel plan; these have: {sorted(PLANS)}")
    embedding, head = VocabParallelEmbedding(model.embedding, mesh), VocabParallelHead(model.head, mesh)
    if config.tie_embeddings:
        head.weight = embedding.weight
    model.add_module("embedding", embedding)
    model.add_module("head", head)
    for block in model.blocks:
        PLANS[config.mixer.name](block.mixer, mesh)
        if block.mlp is not None:
            shard_mlp(block.mlp, mesh)
    audit(model, config, mesh)
    return model


def full_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter of the plain model, from the meta device."""
    with torch.device("meta"):
        return {name: p.shape for name, p in LanguageModel(config).named_parameters()}


def audit(model: nn.Module, config: ModelConfig, mesh: Mesh) -> None:
    """Raise RuntimeError unless marks and shapes agree: cut parameters are marked, replicated ones are not."""
    expected, problems = full_shapes(config), []
    found: dict[str, Any] = dict(model.named_parameters())
    if found.keys() != expected.keys():
        problems.append(f"parameters differ from the plain model's: {sorted(found.keys() ^ expected.keys())}")
    for name, parameter in found.items():
        shape = list(expected.get(name, parameter.shape))
        if getattr(parameter, "tensor_model_parallel", False):
            shape[parameter.partition_dim] //= mesh.tensor_size
            if list(parameter.shape) != shape:
                problems.append(f"{name} is marked as sharded but has shape {list(parameter.shape)}, not {shape}")
        elif list(parameter.shape) != shape:
            problems.append(f"{name} is a shard ({list(parameter.shape)} of {shape}) without marks")
    if problems:
        raise RuntimeError("tensor-parallel audit failed:\n  " + "\n  ".join(problems))

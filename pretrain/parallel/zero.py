"""DeepSpeed ZeRO 1, 2 and 3 around a model: the only importer of deepspeed.

Everything that depends on DeepSpeed's insides is here: the config that works on CPU and GPU, the gradient norm, and
where the fp32 masters and Adam's moments of each parameter lie (`fragments`, what checkpoints are made of).
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.clock import DeviceClock
from pretrain.config import Config
from pretrain.optim import build_optimizer, cast_matrices, is_matrix
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.tensor_parallel import Sharding, sharding_of

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME
from deepspeed.utils import safe_get_full_grad

# A shared-memory all-reduce for one host's CPUs that takes a minute to compile; gloo does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel("ERROR")

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A slice of one parameter that this rank's optimizer owns.

    `start`: where the slice begins in the flattened tensor-parallel shard.
    `tensors`: fp32 views of the master and Adam's moments, [numel] each; writing to them changes the optimizer.
    """

    name: str
    start: int
    numel: int
    tensors: dict[str, Tensor]


class ZeroEngine:
    """A model that trains: forward and backward per micro-batch, then one step."""

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        self.mesh = mesh
        self.stage = config.parallel.zero_stage
        self.grad_accum_steps = config.grad_accum_steps(mesh.data_size)
        model.to(mesh.device)
        if config.train.precision == "bf16":
            _use_bf16_matrices(model, self.stage)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optim),
            config=_deepspeed_config(config, self.grad_accum_steps),
            mpu=mesh,
        )
        if self.stage < 3 and config.train.precision == "bf16":
            # A step whose gradient is not finite must update nothing: it looks by itself, but not in a bf16 group.
            self.engine.optimizer.check_grad_overflow = True
        self.forward_clock = DeviceClock(mesh.device)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._prepare_moments()

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def shardings(self) -> dict[str, Sharding]:
        """How every parameter is cut over tensor ranks."""
        return {name: sharding_of(parameter) for parameter, name in self._names.items()}

    def forward_backward(self, batch: dict[str, Any], n_targets: float) -> Tensor:
        """Accumulate the gradient of one micro-batch; returns its summed loss.

        `n_targets` counts the unmasked targets of the whole global batch: the gradient that `step` uses is that of
        (sum of losses over the global batch) / n_targets.
        """
        on_device = {k: t if t is None else t.to(self.mesh.device, non_blocking=True) for k, t in batch.items()}
        with self.forward_clock:
            loss = self.engine(**on_device)
        # DeepSpeed averages over micro-batches and ranks; our losses are sums.
        self.engine.backward(loss * (self.grad_accum_steps * self.mesh.data_size / n_targets))
        return loss.detach()

    def step(self, learning_rate: float) -> float:
        """Clip, update, zero the gradients; returns the global gradient norm before clipping.

        Where that is not finite, nothing is updated on any rank, and it is NaN (DeepSpeed says -1 or inf).
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else math.nan

    def discard_step(self) -> None:
        """End the step without an update, the way DeepSpeed does where a gradient is not finite."""
        optimizer = self.engine.optimizer
        checks = getattr(optimizer, "check_grad_overflow", None)
        # Each stage calls this method first, and then looks at the flag.
        name = "_overflow_check_and_loss_scale_update" if self.stage == 3 else "check_overflow"
        setattr(optimizer, name, lambda *_, **__: setattr(optimizer, "overflow", True))
        optimizer.check_grad_overflow = True
        try:
            self.engine.step()
        finally:
            delattr(optimizer, name)
            optimizer.check_grad_overflow = checks

    def end_micro_batch(self) -> None:
        """Tell DeepSpeed that a micro-batch which is not the step's last is over."""
        self.engine.step()

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model for forward passes in the training precision, without gradients."""
        self.engine.eval()
        try:
            with torch.no_grad():
                yield self.engine
        finally:
            self.engine.train()

    def full_gradients(self) -> dict[str, Tensor]:
        """Each parameter's reduced gradient (its tensor-parallel shard), after backward and before step."""
        return {name: safe_get_full_grad(p).clone() for p, name in self._names.items()}

    def fragments(self) -> Iterator[Fragment]:
        """This rank's slices of every parameter, in a fixed order."""
        yield from self._zero3_fragments() if self.stage == 3 else self._zero12_fragments()

    def _zero12_fragments(self) -> Iterator[Fragment]:
        optimizer = self.engine.optimizer
        groups = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
        for flat, parameters in groups:
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:  # else none of it lies in this rank's partition
                    here, place = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield self._fragment(flat, parameter, here.start, place.start, place.numel)

    def _zero3_fragments(self) -> Iterator[Fragment]:
        optimizer, rank = self.engine.optimizer, self.mesh.data_rank
        groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        for flat, parameters in groups:
            offset = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                owned = max(0, min(size, parameter.ds_numel - rank * size))  # the last rank's may be padded
                if owned:
                    yield self._fragment(flat, parameter, offset, rank * size, owned)
                offset += size

    def _fragment(self, flat: Tensor, parameter: nn.Parameter, here: int, start: int, numel: int) -> Fragment:
        state = self.engine.optimizer.optimizer.state[flat]
        sources = {MASTER: flat.data} | {name: state[name] for name in MOMENTS}
        tensors = {name: t.narrow(0, here, numel) for name, t in sources.items()}
        return Fragment(self._names[parameter], start, numel, tensors)

    def _flat_partitions(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def _prepare_moments(self) -> None:
        """Make Adam's moments exist before the first step, as a checkpoint is loaded into them."""
        for flat in self._flat_partitions():
            state = self.engine.optimizer.optimizer.state[flat]
            if not state:
                state["step"] = torch.tensor(0.0, device=flat.device if flat.is_cuda else "cpu")
                state.update({name: torch.zeros_like(flat.data) for name in MOMENTS})

    def optimizer_steps(self) -> int:
        """Updates that Adam's bias correction has counted."""
        return int(next(iter(self.engine.optimizer.optimizer.state.values()))["step"])

    def masters_changed(self, optimizer_steps: int) -> None:
        """Make the model's parameters follow the masters that were written through `fragments`."""
        optimizer = self.engine.optimizer
        for flat in self._flat_partitions():
            optimizer.optimizer.state[flat]["step"].fill_(optimizer_steps)
        if self.stage != 3:
            optimizer.update_lp_params()
            return
        for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            flat = optimizer.fp16_partitioned_groups_flat[i]
            if master.numel():
                flat.data.copy_(master.data)
            partitions = optimizer.fp16_partitioned_groups[i]
            for partition, values in zip(partitions, optimizer.unflatten(flat, partitions), strict=True):
                partition.data = values.data
        parameters: list[Any] = list(self.module.parameters())
        for parameter in parameters:
            if parameter.ds_persist:  # small parameters are held gathered: gather them anew
                parameter.partition()
                parameter.all_gather()


def _use_bf16_matrices(model: nn.Module, stage: int) -> None:
    """Matrices in bf16 with fp32 masters; D, dt_bias, norms and other vectors stay fp32.

    ZeRO-3 lays all its parameters in one buffer of one dtype, so there the shards stay fp32 and the matrices are
    gathered, and their gradients reduced, in bf16: the same forward, and the same memory but for the shard.
    """
    if stage != 3:
        return cast_matrices(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if is_matrix(name, parameter):
            setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)


def _deepspeed_config(config: Config, grad_accum_steps: int) -> dict[str, object]:
    """What was tried (DESIGN §10); gradients are reduced and parameters gathered in their own dtype."""
    deepspeed_config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "overlap_comm": False,  # open races in 0.19: off until losses with it are compared
            "contiguous_gradients": True,
        },
        # Not DeepSpeed's bf16: it casts every parameter, D, dt_bias and norms too. "bf16" casts the matrices itself.
        "torch_autocast": {
            "enabled": config.train.precision != "fp32",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    return deepspeed_config

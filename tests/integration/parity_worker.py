"""Run under torchrun by test_parity.py: train every case of one world size, and write down what happened.

    torchrun … parity_worker.py CASES.json OUTPUT

For each case OUTPUT/<name>.json holds losses and gradient norms, OUTPUT/<name>.safetensors the first step's full
gradients ("gradient|…") and the parameters after the last step ("parameter|…"), gathered from all ranks.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from pretrain.config import Config, config_from_dict
from pretrain.parallel import tensor_parallel
from pretrain.parallel.mesh import Mesh, join_world, split_world
from pretrain.parallel.tensor_parallel import copy_to_tensor_model_parallel_region, unshard_tensors
from pretrain.parallel.zero import MASTER, ZeroEngine
from pretrain.trainer import Trainer


class WithoutReduction(tensor_parallel.RowParallelLinear):
    """x_proj as gpt-neox has it: each rank's gradient is only its own channels'."""


class ReducedTwice(tensor_parallel.RowThenColumnLinear):
    def forward(self, x: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(super().forward(x))


BROKEN = {"none": WithoutReduction, "double": ReducedTwice}


def gather_shards(mesh: Mesh, engine: ZeroEngine, shards: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensor-parallel parts to whole parameters."""
    whole = {}
    for name, sharding in engine.shardings().items():
        part = shards[name].view(sharding.shape).contiguous()
        if sharding.dim is None or mesh.tensor_size == 1:
            whole[name] = part
            continue
        parts = [torch.empty_like(part) for _ in range(mesh.tensor_size)]
        dist.all_gather(parts, part, group=mesh.tensor_group)
        whole[name] = unshard_tensors(parts, sharding.dim, sharding.stride)
    return whole


def masters(mesh: Mesh, engine: ZeroEngine) -> dict[str, Tensor]:
    """fp32 masters, gathered over data ranks from their fragments, then over tensor ranks."""
    sizes = {name: torch.Size(s.shape).numel() for name, s in engine.shardings().items()}
    shards = {name: torch.zeros(n) for name, n in sizes.items()}
    for f in engine.fragments():
        shards[f.name][f.start : f.start + f.numel] = f.tensors[MASTER].detach()
    for shard in shards.values():
        dist.all_reduce(shard, group=mesh.data_group)
    return gather_shards(mesh, engine, shards)


def train(trainer: Trainer, steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms, and the first step's gradients as the optimizer gets them."""
    gradients: dict[str, Tensor] = {}
    engine_step = trainer.engine.step

    def step(rate: float) -> float:
        if not gradients:
            gradients.update(gather_shards(trainer.mesh, trainer.engine, trainer.engine.full_gradients()))
        return engine_step(rate)

    trainer.engine.step = step  # type: ignore[method-assign]
    values = [trainer.train_step() for _ in range(steps)]
    return [v["loss"] for v in values], [v["grad_norm"] for v in values], gradients


def run_case(case: dict[str, Any], config: Config, device: torch.device, output: Path) -> None:
    with split_world(config.parallel.tensor, device) as mesh:
        plan = tensor_parallel.RowThenColumnLinear
        if case.get("break"):
            tensor_parallel.RowThenColumnLinear = BROKEN[case["break"]]  # type: ignore[misc]
        trainer = Trainer(config, mesh)
        tensor_parallel.RowThenColumnLinear = plan  # type: ignore[misc]
        losses, norms, gradients = train(trainer, case["steps"])
        if case.get("save"):
            trainer.save()
            trainer.writer.wait()
        tensors = {f"gradient|{n}": t for n, t in gradients.items()}
        tensors |= {f"parameter|{n}": t for n, t in masters(mesh, trainer.engine).items()}
        if mesh.rank == 0:
            save_file({n: t.contiguous() for n, t in tensors.items()}, output / f"{case['name']}.safetensors")
            (output / f"{case['name']}.json").write_text(json.dumps({"losses": losses, "norms": norms}))


def main() -> None:
    torch.set_num_threads(1)
    cases, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    with join_world() as device:
        for case in cases:
            run_case(case, config_from_dict(case["config"]), device, output)


if __name__ == "__main__":
    main()

"""Ranks and process groups: tensor parallel within neighbouring ranks, data parallel across them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

TIMEOUT = timedelta(minutes=10)  # a rank that waits longer for the others has lost one


@dataclass(frozen=True)
class Mesh:
    """This process's place, and the `mpu` that DeepSpeed asks for groups."""

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group()

    # The names DeepSpeed looks for on the object it is given as `mpu`.
    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group

    def all_reduce(self, values: list[float], op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> list[float]:
        """Numbers reduced over the data-parallel ranks (tensor-parallel ranks hold the same)."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op, group=self.data_group)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """Whether any process of the world raises the flag: all get the same answer."""
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return bool(tensor.item())


@contextmanager
def init_mesh(tensor: int) -> Iterator[Mesh]:
    """Join the world that torchrun describes (alone: a world of one), split it, and leave it in order.

    Raises ValueError where the world size is no multiple of `tensor`.
    """
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, alone)  # DeepSpeed reads them too
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world_size % tensor:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(f"parallel.tensor={tensor} does not divide {world_size} processes; what does: {divisors}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    store = None if "MASTER_ADDR" in os.environ else dist.HashStore()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=TIMEOUT,
        **({} if store is None else {"store": store, "rank": rank, "world_size": world_size}),
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    try:
        yield _mesh(device)
        dist.barrier()  # no rank leaves while another still talks to it
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _mesh(device: torch.device) -> Mesh:
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )

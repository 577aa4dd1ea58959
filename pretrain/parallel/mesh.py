"""Ranks and process groups: tensor parallel within neighbouring ranks, data parallel across them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pretrain.config import COLLECTIVE_TIMEOUT, ConfigError

TIMEOUT = timedelta(seconds=COLLECTIVE_TIMEOUT)
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # what torchrun would say to a world of one


@dataclass(frozen=True)
class Mesh:
    """This process's place, and the `mpu` that DeepSpeed asks for groups.

    `control_group` and `writer_group` join all processes over the hosts' network (gloo): what is agreed on there
    waits for no GPU, and the thread that writes checkpoints has one to itself.
    """

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    control_group: dist.ProcessGroup
    writer_group: dist.ProcessGroup

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

    def all_reduce(self, values: list[float]) -> list[float]:
        """Numbers summed over the data-parallel ranks: bit for bit the same everywhere, as ranks decide by them.

        Tensor-parallel ranks hold the same numbers; the first one's count.
        """
        rows = self.gather(values)[:: self.tensor_size]
        return [sum(column) for column in zip(*rows, strict=True)]

    def gather(self, values: list[float]) -> list[list[float]]:
        """Every process's numbers, by rank: all get the same."""
        own = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(rows, own, group=self.control_group)
        return [row.tolist() for row in rows]

    def any(self, flag: bool) -> bool:
        """Whether any process raises the flag: all get the same answer."""
        return any(row[0] for row in self.gather([float(flag)]))

    def gather_objects(self, item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Every process's item, by rank; over the control group, or the given one."""
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=group or self.control_group)
        return items

    def from_first(self, item: Any) -> Any:
        """Rank 0's item."""
        items = [item]
        dist.broadcast_object_list(items, src=0, group=self.control_group)
        return items[0]


@contextmanager
def init_mesh(tensor: int) -> Iterator[Mesh]:
    """Join the world that torchrun describes and split it; leave it in order. Raises what `split_world` does."""
    with join_world() as device, split_world(tensor, device) as mesh:
        yield mesh


@contextmanager
def join_world() -> Iterator[torch.device]:
    """Start the process group: NCCL where there is a GPU, else gloo; without torchrun, a world of one."""
    alone = {name: value for name, value in ALONE.items() if name not in os.environ}
    os.environ.update(alone)  # DeepSpeed reads them too
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= devices:
            raise ValueError(f"process {local_rank} of this node has no GPU: {devices} visible; start {devices}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
        dist.barrier()  # no rank leaves while another still talks to it
    finally:
        dist.destroy_process_group()
        for name in alone:  # another library would take them for a launcher's
            os.environ.pop(name, None)


@contextmanager
def split_world(tensor: int, device: torch.device) -> Iterator[Mesh]:
    """Groups of `tensor` neighbouring ranks, and data parallel across them.

    Raises ConfigError where `tensor` does not divide the world size.
    """
    world_size = dist.get_world_size()
    if world_size % tensor:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ConfigError(f"parallel.tensor={tensor} does not divide {world_size} processes; what does: {divisors}")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    hosts = [dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2)]
    try:
        yield _mesh(device, *hosts)
    finally:
        _leave_groups(hosts)


def _leave_groups(hosts: list[dist.ProcessGroup]) -> None:
    """megatron-core forgets its groups without ending them; each would keep its threads until the process ends."""
    groups = {group for group in parallel_state._global_process_group_list or [] if group is not None}
    parallel_state.destroy_model_parallel()
    for group in [*hosts, *groups]:
        with suppress(ValueError):  # megatron-core has some that torch does not count as a group
            dist.destroy_process_group(group)


def _mesh(device: torch.device, control_group: dist.ProcessGroup, writer_group: dist.ProcessGroup) -> Mesh:
    return Mesh(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        control_group=control_group,
        writer_group=writer_group,
    )

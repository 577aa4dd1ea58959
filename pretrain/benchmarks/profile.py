"""Where a training step's time goes: the profiler's kernels, grouped by what they are for."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

IDLE, OTHER, MATMUL = "idle", "other", "matmul"
UNTRACED = "not traced to an operation"
# What a kernel's own name settles whoever launched it: matmuls in the loss are matmuls.
MATMUL_NAME = re.compile(r"gemm|gemv|cutlass|nvjet|cublas|splitk|^aten::(mm|addmm|bmm|baddbmm|matmul)$", re.IGNORECASE)
# Else the nearest operation around it that is one of these.
OPERATIONS = {
    "scan backward": r"^_\w*Scan\w*Backward$",
    "scan forward": r"^_\w*Scan$",
    "convolution": r"^_\w*Conv\w*$",
    "norm": r"^_RMSNorm\w*$",
    "cross-entropy": r"^_(SummedLoss|Losses)\w*$",
    "optimizer and clipping": r"^Optimizer\.|^aten::_foreach_|^aten::_fused_adamw",
    "embedding": r"embedding",
}
# Else by the kernel's name.
NAMES = {
    "copies and casts": r"copy|memcpy|_to_copy|::to$",
    "fill": r"memset|fill|zero_",
    "reductions": r"reduce|::sum|norm",
    "elementwise": r"elementwise|^aten::(add|mul|div|neg|sub)",
}


@dataclass(frozen=True)
class Kernel:
    """One kernel's run (without a GPU, one operation's own time), and the operations it ran in, innermost first."""

    name: str
    within: tuple[str, ...]
    microseconds: float

    @property
    def group(self) -> str:
        if MATMUL_NAME.search(self.name):
            return MATMUL
        for name in (self.name, *self.within):
            for group, pattern in OPERATIONS.items():
                if re.search(pattern, name):
                    return group
        for group, pattern in NAMES.items():
            if re.search(pattern, self.name, re.IGNORECASE):
                return group
        return OTHER


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of a step by group, largest first, and the kernels that took most of each."""

    milliseconds: dict[str, float]
    largest_kernels: dict[str, dict[str, float]]

    @classmethod
    def of(cls, kernels: list[Kernel], steps: int, step_milliseconds: float) -> "Breakdown":
        """Of the kernels of `steps` steps. What they don't fill of a step's time, taken unprofiled, is idle."""
        groups: dict[str, dict[str, float]] = {}
        for kernel in kernels:
            names = groups.setdefault(kernel.group, {})
            names[kernel.name] = names.get(kernel.name, 0.0) + kernel.microseconds / 1e3 / steps
        totals = {group: sum(names.values()) for group, names in groups.items()}
        totals[IDLE] = max(0.0, step_milliseconds - sum(totals.values()))
        largest = {group: dict(sorted(names.items(), key=_time, reverse=True)[:3]) for group, names in groups.items()}
        return cls(dict(sorted(totals.items(), key=_time, reverse=True)), largest)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "milliseconds": {group: round(ms, 3) for group, ms in self.milliseconds.items()},
            "largest_kernels": {
                group: {name[:120]: round(ms, 3) for name, ms in names.items()}
                for group, names in self.largest_kernels.items()
            },
        }


def _time(item: tuple[str, float]) -> float:
    return item[1]


def profile_kernels(step: Callable[[], None], steps: int, device: torch.device) -> list[Kernel]:
    """What runs on the device in `steps` calls."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.events() or []
    return list(_launched(events) if on_gpu else _own_times(events))


def _own_times(events: list[FunctionEvent]) -> Iterator[Kernel]:
    for event in events:
        yield Kernel(event.name, tuple(_around(event)), event.self_cpu_time_total)


def _launched(events: list[FunctionEvent]) -> Iterator[Kernel]:
    traced = 0.0
    for event in events:
        for kernel in event.kernels:
            if kernel.name != event.name:  # else a record_function's span, not a kernel
                traced += kernel.duration
                yield Kernel(kernel.name, (event.name, *_around(event)), kernel.duration)
    on_device = (e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    # What the profiler could not trace to an operation is time of the device all the same.
    yield Kernel(UNTRACED, (), max(0.0, sum(e.time_range.elapsed_us() for e in on_device) - traced))


def _around(event: FunctionEvent) -> Iterator[str]:
    parent = event.cpu_parent
    while parent is not None:
        yield parent.name
        parent = parent.cpu_parent

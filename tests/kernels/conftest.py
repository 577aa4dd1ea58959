"""What the ops' tests share."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poison_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an op reads before it writes is NaN."""

    def poisoned(make: Callable, *args, **kwargs) -> Tensor:
        buffer = make(*args, **kwargs)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, partial(poisoned, getattr(torch, name)))

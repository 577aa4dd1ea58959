"""The states of every random number generator of this process, as tensors."""

import random

import numpy as np
import torch
from torch import Tensor


def states(device: torch.device) -> dict[str, Tensor]:
    """torch's (host and GPU), NumPy's and Python's."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, internal, next_gauss = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss]),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor(internal),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore(found: dict[str, Tensor], device: torch.device) -> None:
    """Set what `states` returned; a GPU's state only where both have one."""
    torch.set_rng_state(found["torch"])
    *keys, position, has_gauss = found["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, found["numpy_gauss"].item()))
    next_gauss = found["python_gauss"].tolist()
    random.setstate((3, tuple(found["python"].tolist()), next_gauss[0] if next_gauss else None))
    if device.type == "cuda" and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"], device)

"""Tests of the Triton kernels: on a GPU where there is one, else under Triton's interpreter.

The interpreter must be switched on before anything imports triton, which other tests do: so these files are collected
only on a GPU (`make gpu-test`) or with TRITON_INTERPRET=1; tests/kernels/test_interpreter.py runs them so.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
if not (INTERPRETED or ON_GPU):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> str:
    """Where the kernels under test run."""
    return "cuda" if ON_GPU else "cpu"

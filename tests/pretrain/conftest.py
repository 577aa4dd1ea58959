"""What the tests of training share: a mesh of one process, and a small run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longhorn_layers.config import ModelConfig
from pretrain.config import Config
from pretrain.parallel.mesh import Mesh, init_mesh


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    # ZeRO-3 replaces this function for the rest of the process: give other tests torch's own back.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    with init_mesh(1) as mesh:
        yield mesh


@pytest.fixture
def config(shard, tmp_path: Path) -> Config:  # type: ignore[no-untyped-def]
    """Ten steps of 64 tokens."""
    config = Config(run_dir=str(tmp_path / "run"))
    config.model = ModelConfig(vocab_size=512, d_model=32, n_layer=1)
    config.data.train, config.data.seqlen = shard.prefix, 16
    config.train.total_tokens, config.train.global_batch_size, config.train.micro_batch_size = 640, 4, 4
    config.train.precision, config.checkpoint.keep_last = "fp32", 2
    config.log.wandb, config.eval.interval = "disabled", 0
    return config

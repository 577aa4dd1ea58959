"""What the tests of evaluation share: real text as tokens, and a model to which what is far back matters."""

import numpy as np
import pytest
import torch

from data_tools.dataset import open_dataset
from longhorn_layers.config import LonghornConfig, ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.data import token_stream


@pytest.fixture(scope="session")
def stream(shard) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Twelve real documents of very different lengths."""
    return token_stream(open_dataset(shard.prefix))


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    """Random weights, scaled so that what is far back changes the loss."""
    torch.manual_seed(0)
    config = ModelConfig(LonghornConfig(d_state=4), vocab_size=512, d_model=16, n_layer=2)
    model = LanguageModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("_proj.weight", "dt_head.weight")):
                weight.mul_(3)
            elif name.endswith("embedding.weight"):
                weight.mul_(10)
            elif name.endswith("dt_bias"):
                weight.sub_(3)  # forget slowly
    return model.eval()

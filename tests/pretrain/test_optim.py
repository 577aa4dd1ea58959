"""The schedule and the parameter groups."""

import pytest
import torch

from longhorn_layers.config import MambaConfig, ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.config import Config
from pretrain.optim import cast_matrices, learning_rate, parameter_groups


def test_warm_up_then_cosine_in_tokens() -> None:
    config = Config()
    config.data.seqlen, config.train.global_batch_size, config.train.total_tokens = 10, 10, 10_000
    config.optim.lr, config.optim.min_lr, config.optim.warmup_fraction = 1.0, 0.1, 0.1
    rates = [learning_rate(config, step * 100) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9] == max(rates) == 1.0
    assert rates[54] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))
    config.optim.warmup_fraction = 0.0
    assert learning_rate(config, 0) == pytest.approx(1.0, abs=1e-3)


def test_only_matrices_decay() -> None:
    model = LanguageModel(ModelConfig(vocab_size=128, d_model=16, n_layer=1))
    names = {p: name for name, p in model.named_parameters()}
    decayed, kept = ({names[p] for p in group["params"]} for group in parameter_groups(model, 0.1))
    mixer = "blocks.0.mixer."
    assert kept == {"blocks.0.norm.weight", "norm.weight"} | {mixer + n for n in ("D", "dt_bias", "conv.bias")}
    assert decayed | kept == set(names.values()) and not decayed & kept


def test_rates_of_mamba_neither_decay_nor_lose_digits() -> None:
    model = LanguageModel(ModelConfig(mixer=MambaConfig(), vocab_size=128, d_model=16, n_layer=1))
    rates = model.blocks[0].mixer.A_log
    assert any(p is rates for p in parameter_groups(model, 0.1)[1]["params"])
    cast_matrices(model, torch.bfloat16)
    assert rates.dtype == torch.float32 and model.blocks[0].mixer.in_proj.weight.dtype == torch.bfloat16


def test_bf16_keeps_vectors_in_fp32() -> None:
    model = LanguageModel(ModelConfig(vocab_size=128, d_model=16, n_layer=1))
    cast_matrices(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        vector = name.endswith(("norm.weight", ".D", "dt_bias", "conv.bias"))
        assert parameter.dtype == (torch.float32 if vector else torch.bfloat16), name
    assert model.head.weight is model.embedding.weight

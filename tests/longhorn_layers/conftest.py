"""What the tests of the exports' code share: small models of random weights, with and without the kernels."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from longhorn_layers.hf import modeling_gla, modeling_longhorn, recurrent_lm
from longhorn_layers.hf.configuration_gla import GLAConfig
from longhorn_layers.hf.configuration_longhorn import LonghornConfig

SHAPE = {"vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 3, "eos_token_id": None}
GLA_SHAPE = {"num_heads": 3, "gate_rank": 4, "mlp_size": 40}
EVENTFUL = ("dt_bias", ".D", "norm.weight", "decay_bias")

ModelMaker = Callable[..., PreTrainedModel]


@pytest.fixture
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code as it runs where this repository can't be imported."""
    monkeypatch.setattr(recurrent_lm, "fused_rms_norm", None)
    monkeypatch.setattr(modeling_longhorn, "conv_kernels", None)
    monkeypatch.setattr(modeling_longhorn, "scan_kernels", None)
    monkeypatch.setattr(modeling_gla, "fused_gla", None)


@pytest.fixture
def make_model() -> ModelMaker:
    """("diagonal" | "exact" | "gla", **config) -> a model large enough that memory matters to what it predicts."""

    def make(kind: str = "diagonal", **config: object) -> PreTrainedModel:
        torch.manual_seed(0)
        model: PreTrainedModel
        if kind == "gla":
            model = modeling_gla.GLAForCausalLM(GLAConfig(**SHAPE | GLA_SHAPE | config))
        else:
            settings = SHAPE | {"state_size": 5, "update_rule": kind} | config
            model = modeling_longhorn.LonghornForCausalLM(LonghornConfig(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(EVENTFUL):
                    parameter.add_(torch.randn_like(parameter) / 2)
                elif name.endswith(("_proj.weight", "dt_head.weight", "decay_up.weight")):
                    parameter.mul_(3)
        return model.eval()

    return make


@pytest.fixture
def save_with_code(monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel, Path], Path]:
    """Saves a model with its remote code, as an export is."""

    def save(model: PreTrainedModel, folder: Path) -> Path:
        for cls, auto_class in ((type(model.config), "AutoConfig"), (type(model), "AutoModelForCausalLM")):
            monkeypatch.setattr(cls, "_auto_class", None)
            cls.register_for_auto_class(auto_class)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def left_padded() -> Callable[[list[Tensor]], tuple[Tensor, Tensor]]:
    """Rows -> (ids, mask), padded with an ordinary token, so that only the mask tells."""

    def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        ids, mask = torch.full((len(rows), longest), 11), torch.zeros(len(rows), longest, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = row
            mask[index, longest - len(row) :] = 1
        return ids, mask

    return pad

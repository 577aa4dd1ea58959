"""The Longhorn authors' checkpoints, against a plain loop over their names, and what they must not hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.hf import ConversionError
from pretrain.hf.official import load_official

D_MODEL, D_INNER, D_STATE, D_CONV, DT_RANK, N_LAYER = 8, 24, 3, 4, 2, 2
VOCAB_SIZE, ROWS = 27, 32  # they pad to a multiple of 8
CONFIG: dict[str, Any] = {
    "d_model": D_MODEL,
    "d_intermediate": 0,
    "n_layer": N_LAYER,
    "vocab_size": VOCAB_SIZE,
    "ssm_cfg": {"d_state": D_STATE, "expand": 3, "dt_rank": DT_RANK},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
    "d_state": D_STATE,
}


def make_weights(tied: bool = True) -> dict[str, Tensor]:
    """Random numbers under the authors' names, in their shapes; LonghornLMHeadModel.state_dict() has the head, too."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] if len(shape) == 2 else 1) ** -0.5

    weights = {"backbone.embedding.weight": normal(ROWS, D_MODEL), "backbone.norm_f.weight": 1 + normal(D_MODEL) / 4}
    for layer in range(N_LAYER):
        mixer = f"backbone.layers.{layer}.mixer"
        weights |= {
            f"{mixer}.D": normal(D_INNER),
            f"{mixer}.in_proj.weight": normal(2 * D_INNER, D_MODEL),
            f"{mixer}.conv1d.weight": normal(D_INNER, 1, D_CONV),
            f"{mixer}.conv1d.bias": normal(D_INNER),
            f"{mixer}.x_proj.weight": normal(DT_RANK + 2 * D_STATE, D_INNER),
            f"{mixer}.dt_head.weight": normal(D_INNER, DT_RANK),
            f"{mixer}.dt_head.bias": normal(D_INNER),
            f"{mixer}.out_proj.weight": normal(D_MODEL, D_INNER),
            f"backbone.layers.{layer}.norm.weight": 1 + normal(D_MODEL) / 4,
        }
    head = weights["backbone.embedding.weight"] if tied else normal(ROWS, D_MODEL)
    return weights | {"lm_head.weight": head}


def write(folder: Path, config: dict[str, Any] = CONFIG, **changes: Any) -> Path:
    """config.json and pytorch_model.bin as the authors' `save_pretrained` writes them; a change to None deletes."""
    weights = {name: weight for name, weight in (make_weights() | changes).items() if weight is not None}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def official_logits(weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """(tokens, rows) in float64: the layer's equations (DESIGN §2), token by token, straight from the file's names."""
    w = {name: weight.double() for name, weight in weights.items()}

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x = w["backbone.embedding.weight"][ids]
    for layer in range(N_LAYER):
        prefix = f"backbone.layers.{layer}."
        x = x + mixer(norm(x, w[prefix + "norm.weight"]), {n.removeprefix(prefix + "mixer."): t for n, t in w.items()})
    return norm(x, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


def mixer(hidden: Tensor, w: dict[str, Tensor]) -> Tensor:
    x, z = (hidden @ w["in_proj.weight"].T).chunk(2, -1)
    state, outputs = torch.zeros(D_INNER, D_STATE, dtype=torch.float64), []
    for t in range(len(hidden)):
        u = w["conv1d.bias"].clone()
        for tap in range(D_CONV):  # the last one is the newest token's
            if (place := t - (D_CONV - 1 - tap)) >= 0:
                u += w["conv1d.weight"][:, 0, tap] * x[place]
        u = F.silu(u)
        dt, k, q = (w["x_proj.weight"] @ u).split([DT_RANK, D_STATE, D_STATE])
        beta = torch.sigmoid(w["dt_head.weight"] @ dt + w["dt_head.bias"])
        eps = beta / (1 + beta * k.square().sum())
        state = (1 - torch.outer(eps, k.square())) * state + torch.outer(eps * u, k)
        outputs.append(w["out_proj.weight"] @ ((state @ q + w["D"] * u) * F.silu(z[t])))
    return torch.stack(outputs)


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_the_logits_are_those_of_the_papers_equations(tied: bool, tmp_path: Path) -> None:
    weights = make_weights(tied)
    write(tmp_path, CONFIG | {"tie_embeddings": tied}, **weights)
    model = load_official(tmp_path)
    assert (model.config.vocab_size, model.config.padded_vocab_size, model.config.tie_embeddings) == (27, 128, tied)
    ids = torch.randint(VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = official_logits(weights, ids)[:, :VOCAB_SIZE]
    found = model(torch.tensor([ids]))[0, :, :VOCAB_SIZE]
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert model.embedding.weight[VOCAB_SIZE:].abs().max() == 0  # their padding is dropped, ours is zero


def test_fields_that_are_left_out_have_the_authors_defaults(tmp_path: Path) -> None:
    weights = dict.fromkeys(make_weights())
    d_inner = 2 * D_MODEL
    shapes = {"in_proj.weight": (2 * d_inner, D_MODEL), "conv1d.weight": (d_inner, 1, 4), "conv1d.bias": (d_inner,)}
    shapes |= {"x_proj.weight": (1 + 2 * 16, d_inner), "dt_head.weight": (d_inner, 1), "dt_head.bias": (d_inner,)}
    shapes |= {"D": (d_inner,), "out_proj.weight": (D_MODEL, d_inner)}
    mixers = {f"backbone.layers.0.mixer.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    norms = {name: torch.ones(D_MODEL) for name in ("backbone.layers.0.norm.weight", "backbone.norm_f.weight")}
    embedding = {"backbone.embedding.weight": torch.zeros(ROWS, D_MODEL)}
    config = {"d_model": D_MODEL, "n_layer": 1, "vocab_size": VOCAB_SIZE}
    model = load_official(write(tmp_path, config, **weights | mixers | norms | embedding))
    assert (model.config.mixer.d_state, model.config.norm_eps, model.config.tie_embeddings) == (16, 1e-5, True)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm": False}, "config.json: rms_norm is False; ours can only be True"),
        ({"d_intermediate": 64}, "d_intermediate is 64; ours can only be 0"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]; ours can only be \[\]"),
        ({"ssm_cfg": {"bias": True}}, "bias is True; ours can only be False"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "unknown field 'layer'; known are bias, conv_bias, d_conv"),
        ({"hidden_size": 8}, "unknown field 'hidden_size'; known are .*d_model"),
        ({"d_state": 16}, "d_state is 16, but ssm_cfg.d_state is 3"),
        ({"vocab_size": "27"}, "vocab_size must be a whole number above 0, is '27'"),
        ({"n_layer": None}, "n_layer must be a whole number above 0, is None"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple must be a whole number above 0, is 0"),
        ({"pad_vocab_size_multiple": 5}, r"embedding.weight is \[32, 8\], by the config it must be \[30, 8\]"),
        ({"n_layer": 3}, "9 missing: backbone.layers.2.mixer.D, "),
        (
            {"ssm_cfg": {"d_state": 3, "expand": 2}, "d_state": 3},
            r"dt_head.bias is \[24\], by the config it must be \[16\]",
        ),
    ],
)
def test_another_config(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, CONFIG | change)
    with pytest.raises(ConversionError, match=message):
        load_official(tmp_path)


def test_other_weights(tmp_path: Path) -> None:
    head, bias = "lm_head.weight", "backbone.layers.0.mixer.dt_head.bias"
    for changes, message in (
        ({head: torch.ones(ROWS, D_MODEL)}, "lm_head.weight should be backbone.embedding.weight"),
        ({bias: None, "extra": torch.ones(1)}, f"1 missing: {bias}; 1 unexpected: extra"),
        ({bias: torch.ones(2)}, rf"{bias} is \[2\], by the config it must be \[24\]"),
        ({bias: torch.ones(D_INNER, dtype=torch.int64)}, f"{bias} is torch.int64, must be float32, bfloat16 or"),
    ):
        with pytest.raises(ConversionError, match=message):
            load_official(write(tmp_path, **changes))


def test_16_bit_weights_are_widened(tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in make_weights().items()}
    model = load_official(write(tmp_path, **weights))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.blocks[1].mixer.D, weights["backbone.layers.1.mixer.D"].float())


def test_a_file_that_would_run_code_or_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, **{"lm_head.weight": Path.unlink})
    with pytest.raises(ConversionError, match=r"pytorch_model.bin: can't be read as tensors alone"):
        load_official(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ConversionError, match=r"pytorch_model.bin"):
        load_official(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConversionError, match=r"config.json"):
        load_official(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config.json"):
        load_official(tmp_path)

"""The remote code of a GLA export by its definition, in plain PyTorch; see test_hf.py for what it shares."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import PreTrainedModel

from longhorn_layers import config
from longhorn_layers.hf.configuration_gla import GLAConfig
from longhorn_layers.hf.modeling_gla import GLAForCausalLM
from longhorn_layers.hf.recurrence import SCAN_CHUNK
from longhorn_layers.model import LanguageModel

HEADS, LAYERS = 3, 3  # as conftest's make_model has them
ModelMaker = Callable[..., PreTrainedModel]
pytestmark = pytest.mark.usefixtures("plain_pytorch")


def make_ids(batch: int, seqlen: int) -> Tensor:
    return torch.randint(67, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def mixer_oracle(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The layer by its definition: one sequence (L, C), a head and a token at a time."""
    q, k, v = (x @ w[f"{name}_proj.weight"].T for name in "qkv")
    gate = torch.sigmoid(x @ w["decay_down.weight"].T @ w["decay_up.weight"].T + w["decay_bias"]) ** (1 / 16)
    heads = []
    for q_h, k_h, v_h, gate_h in zip(*(y.chunk(HEADS, -1) for y in (q, k, v, gate)), strict=True):
        state, outputs = x.new_zeros(k_h.shape[1], v_h.shape[1]), []
        for t in range(len(x)):
            state = torch.diag(gate_h[t]) @ state + torch.outer(k_h[t], v_h[t])
            outputs.append(state.T @ q_h[t] / k_h.shape[1] ** 0.5)
        heads.append(rms_norm(torch.stack(outputs), w["norm.weight"]))
    return (torch.cat(heads, -1) * silu(x @ w["g_proj.weight"].T)) @ w["out_proj.weight"].T


def logits_oracle(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(L,) ids -> (L, vocab) float64, differentiable in the parameters of a float64 model."""
    weights = {name: weight.double() for name, weight in model.state_dict(keep_vars=True).items()}
    x = weights["model.embedding.weight"][ids]
    for index in range(LAYERS):
        prefix = f"model.blocks.{index}."
        block = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): w for name, w in block.items() if name.startswith("mixer.")}
        x = x + mixer_oracle(mixer, rms_norm(x, block["norm.weight"]))
        y = rms_norm(x, block["mlp_norm.weight"])
        y = silu(y @ block["mlp.gate_proj.weight"].T) * (y @ block["mlp.up_proj.weight"].T)
        x = x + y @ block["mlp.down_proj.weight"].T
    return rms_norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@torch.no_grad()
def test_logits_are_those_of_the_definition(make_model: ModelMaker) -> None:
    model, ids = make_model("gla"), make_ids(2, SCAN_CHUNK + 9)
    expected = torch.stack([logits_oracle(model, row) for row in ids])
    single = model(ids).logits
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.double()(ids).logits, expected, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_the_definition(make_model: ModelMaker) -> None:
    model, ids = make_model("gla").double().train(), make_ids(1, SCAN_CHUNK + 9)
    direction = torch.randn(ids.shape[1], 67, dtype=torch.float64)
    losses = ((model(ids).logits * direction).sum(), (logits_oracle(model, ids[0]) * direction).sum())
    parameters = dict(model.named_parameters())
    ours, expected = (torch.autograd.grad(loss, list(parameters.values())) for loss in losses)
    for name, gradient, oracle in zip(parameters, ours, expected, strict=True):
        assert oracle.norm() > 0, name
        assert (gradient - oracle).norm() <= 1e-9 * oracle.norm(), name


@torch.no_grad()
def test_cached_pieces_equal_the_whole(make_model: ModelMaker) -> None:
    model, ids = make_model("gla").double(), make_ids(2, 30)
    whole = model(ids, use_cache=False)
    assert whole.cache_params is None
    cache, pieces = None, []
    for piece in ids.split([1, 2, 20, 1, 6], dim=1):
        outputs = model(piece, cache_params=cache, use_cache=True)
        cache = outputs.cache_params
        pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, rtol=1e-10, atol=1e-10)
    cache.reset()
    again = model(ids, cache_params=cache, use_cache=True).logits
    torch.testing.assert_close(again, whole.logits, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_left_padding_changes_nothing(
    make_model: ModelMaker, left_padded: Callable[[list[Tensor]], tuple[Tensor, Tensor]]
) -> None:
    model = make_model("gla").double()
    rows = [make_ids(1, seqlen)[0] for seqlen in (3, 19, 8)]
    ids, mask = left_padded(rows)
    logits = model(ids, attention_mask=mask).logits
    for row, row_logits in zip(rows, logits, strict=True):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(row_logits[-len(row) :], alone, rtol=1e-10, atol=1e-10)
    assert (model(ids).logits[0, -3:] - model(rows[0][None]).logits[0]).abs().max() > 0.01


def test_parameters_are_the_trained_models(make_model: ModelMaker, tmp_path: Path) -> None:
    """Names and shapes of LanguageModel's, and its logits."""
    mixer = config.GLAConfig(n_head=HEADS, gate_rank=4)
    trained = LanguageModel(config.ModelConfig(mixer=mixer, vocab_size=67, d_model=24, n_layer=LAYERS, d_ff=40))
    weights = {f"model.{name}": weight for name, weight in trained.state_dict().items() if name != "head.weight"}
    weights["model.embedding.weight"] = weights["model.embedding.weight"][:67].clone()
    model = make_model("gla")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name: w.shape for name, w in saved.items()} == {name: w.shape for name, w in weights.items()}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embedding.weight"]})
    ids = make_ids(2, 20)
    torch.testing.assert_close(model(ids).logits, trained(ids)[..., :67], rtol=1e-5, atol=1e-5)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = GLAForCausalLM(GLAConfig(vocab_size=500, hidden_size=64, num_hidden_layers=4, mlp_size=128))
    block = model.model.blocks[0]
    assert block.mixer.decay_bias.eq(0).all() and block.mixer.norm.weight.eq(1).all()
    assert model.model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    bounds = {
        block.mixer.q_proj: 64**-0.5,
        block.mixer.out_proj: (64 * 8) ** -0.5,  # of 8 that write to the stream
        block.mlp.up_proj: 64**-0.5,
        block.mlp.down_proj: (128 * 8) ** -0.5,
    }
    for linear, bound in bounds.items():
        assert 0.9 * bound < linear.weight.abs().max().item() <= bound


def test_half_precision_keeps_what_needs_fp32(make_model: ModelMaker, tmp_path: Path) -> None:
    make_model("gla").save_pretrained(tmp_path)
    model = GLAForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    of_a_block = ("norm.weight", "mlp_norm.weight", "mixer.norm.weight", "mixer.decay_bias")
    expected = {f"model.blocks.{index}.{name}" for index in range(LAYERS) for name in of_a_block}
    assert kept == expected | {"model.norm.weight"}
    ids = make_ids(2, 40)
    with torch.no_grad():
        outputs, single = model(ids, use_cache=True), make_model("gla")(ids).logits
    assert outputs.logits.dtype == torch.float32
    assert outputs.cache_params.layers[0].recurrent_states[0].dtype == torch.float32
    assert (outputs.logits - single).norm() / single.norm() < 0.05


def test_wrong_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expand_k \* hidden_size = 32, must be a multiple of 5"):
        GLAConfig(hidden_size=64, num_heads=5)

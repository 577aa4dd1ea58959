"""The plain language model: sizes, initialisation, state, documents, loss."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longhorn_layers.config import AttentionConfig, GLAConfig, LonghornConfig, MambaConfig, MixerConfig, ModelConfig
from longhorn_layers.longhorn import LonghornMixer
from longhorn_layers.model import LanguageModel, count_parameters
from pretrain.config import load_config
from pretrain.optim import cast_matrices

SIZES = {"125m": 114_506_496, "350m": 351_224_832, "1p3b": 1_331_595_264}  # of Longhorn
MIXERS = {
    "longhorn": {"mixer": LonghornConfig()},
    "exact": {"mixer": LonghornConfig(update="exact")},
    "mamba": {"mixer": MambaConfig()},
    "gla": {"mixer": GLAConfig(n_head=2), "d_ff": 48},
    "llama": {"mixer": AttentionConfig(head_dim=16), "d_ff": 48},
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


def small_model(name: str = "longhorn", **options: object) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=200, d_model=32, n_layer=2, **MIXERS[name], **options)).double()


def tokens(*shape: int) -> Tensor:
    return torch.randint(200, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", SIZES)
def test_parameters_follow_the_formula(size: str) -> None:
    config = load_config(f"launch/configs/{size}.yaml").model
    n, d, inner, state, rank = config.n_layer, config.d_model, 2 * config.d_model, 16, -(-config.d_model // 16)
    formula = n * (3 * d * inner + inner * (rank + 2 * state) + rank * inner + 7 * inner + d) + 32000 * d + d
    assert count_parameters(config) == formula == SIZES[size]


@pytest.mark.parametrize("size", SIZES)
def test_presets_of_other_mixers_have_as_many_parameters_and_the_same_recipe(size: str) -> None:
    ours, others = load_config(f"launch/configs/{size}.yaml"), sorted(Path("launch/configs").glob(f"*-{size}.yaml"))
    assert len(others) == (2 if size == "1p3b" else 6)
    for path in others:
        other = load_config(path)
        assert count_parameters(other.model) == pytest.approx(SIZES[size], rel=0.0105), path
        assert other.run_dir == f"runs/{path.stem}"
        other.model, other.run_dir = ours.model, ours.run_dir
        assert other == ours, path


def test_initialisation() -> None:
    torch.manual_seed(0)
    n_layer, d_model = 4, 256
    model = LanguageModel(ModelConfig(d_model=d_model, n_layer=n_layer, vocab_size=4096))
    mixer = model.blocks[0].mixer
    assert torch.equal(mixer.D, torch.ones(512)) and torch.equal(mixer.dt_bias, torch.zeros(512))
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert model.head.weight is model.embedding.weight
    bound = 512**-0.5 / n_layer**0.5  # kaiming-uniform(√5) is U(±1/√fan_in)
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert mixer.in_proj.weight.abs().max().item() == pytest.approx(d_model**-0.5, rel=1e-3)
    assert mixer.conv.weight.abs().max().item() == pytest.approx(0.5, rel=1e-2)
    untied = LanguageModel(ModelConfig(d_model=32, n_layer=1, vocab_size=130, tie_embeddings=False))
    assert untied.head.weight.shape == (256, 32) and untied.head.weight is not untied.embedding.weight


@every_mixer
def test_chunks_and_single_tokens_with_state_equal_the_whole(name: str) -> None:
    model, ids = small_model(name), tokens(3, 40)
    with torch.no_grad():
        whole = model(ids)
        state, parts = model.new_state(3), []
        for start, end in ((0, 17), (17, 18), (18, 19), (19, 21), (21, 40)):
            parts.append(model(ids[:, start:end], state=state))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


@every_mixer
def test_a_state_is_used_where_activations_are_recomputed(name: str) -> None:
    model, ids = small_model(name).requires_grad_(False), tokens(2, 20)
    model.activation_checkpointing = True  # and gradients are enabled
    state = model.new_state(2)
    parts = torch.cat([model(part, state=state) for part in ids.split(10, 1)], 1)
    torch.testing.assert_close(parts, model(ids), rtol=1e-10, atol=1e-10)


@every_mixer
def test_packed_documents_equal_separate_ones(name: str) -> None:
    model, ids = small_model(name), tokens(1, 50)
    bounds = [0, 2, 30, 50]  # the first is shorter than the convolution
    packed = model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        torch.testing.assert_close(packed[:, start:end], model(ids[:, start:end]), rtol=1e-10, atol=1e-10)


@every_mixer
def test_a_token_does_not_see_the_future(name: str) -> None:
    model, ids = small_model(name), tokens(1, 30)
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 200
    with torch.no_grad():
        a, b = model(ids)[..., :200], model(changed)[..., :200]
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=0, atol=1e-14)
    assert (a[:, 20:] - b[:, 20:]).abs().amax((0, 2)).min() > 1e-6  # every later token does see it


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, ids, targets = small_model(), tokens(2, 30), tokens(2, 30).flip(1)
    targets[0, :5] = -100
    logits = model(ids)
    assert logits.shape == (2, 30, 256) and torch.isneginf(logits[..., 200:]).all()
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(model(ids, targets, reduction="none").flatten(), want, check_dtype=False)
    torch.testing.assert_close(model(ids, targets), want.sum(), check_dtype=False)


@every_mixer
@pytest.mark.parametrize("tied", [True, False])
def test_recomputed_activations_give_the_same_gradients(name: str, tied: bool) -> None:
    gradients = []
    for recompute in (False, True):
        model = small_model(name, tie_embeddings=tied)
        model.activation_checkpointing = recompute
        model(tokens(2, 20), tokens(2, 20)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.any(), name


@every_mixer
def test_residual_stream_and_logits_stay_fp32_with_bf16_matrices(name: str) -> None:
    model = small_model(name).float()
    cast_matrices(model, torch.bfloat16)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0].dtype))
        block.mixer.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens(1, 8)).dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32] * 2  # norms write what the mixer's matmul reads


def test_unknown_mixer_is_named() -> None:
    with pytest.raises(ValueError, match=r"'lstm' is not one of \['attention', 'gla', 'longhorn', 'mamba'\]"):
        LanguageModel(ModelConfig(mixer=MixerConfig(name="lstm")))


def test_dt_rank_rule() -> None:
    assert LonghornMixer(LonghornConfig(), 40, 1).dt_rank == 3
    assert LonghornMixer(LonghornConfig(dt_rank=7), 40, 1).dt_rank == 7

"""The baselines' mixers by their definitions: one text, float64, a loop over time, no kernel."""

import math

import pytest
import torch
from torch import Tensor, nn

from longhorn_layers.attention import AttentionMixer
from longhorn_layers.config import AttentionConfig, GLAConfig, MambaConfig, MixerConfig, ModelConfig
from longhorn_layers.gla import GLAMixer
from longhorn_layers.mamba import MambaMixer
from longhorn_layers.model import LanguageModel

D_MODEL, SEQLEN = 24, 13


def shaken(mixer: nn.Module) -> nn.Module:
    """Weights large enough that every one matters, biases and norms not at their neutral values."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return mixer.double()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def mamba_by_definition(mixer: MambaMixer, hidden: Tensor) -> Tensor:
    x, z = (hidden @ mixer.in_proj.weight.T).chunk(2, -1)
    taps = mixer.conv.weight.shape[1]
    state, outputs = torch.zeros(x.shape[1], mixer.d_state, dtype=x.dtype), []
    for t in range(len(x)):
        u = mixer.conv.bias + sum(
            mixer.conv.weight[:, taps - 1 - back] * x[t - back] for back in range(min(taps, t + 1))
        )
        u = silu(u)
        low, B, C = (mixer.x_proj.weight @ u).split([mixer.dt_rank, mixer.d_state, mixer.d_state])
        delta = (1 + (mixer.dt_head.weight @ low + mixer.dt_bias).exp()).log()[:, None]
        state = (-delta * mixer.A_log.exp()).exp() * state + delta * u[:, None] * B
        outputs.append((state @ C + mixer.D * u) * silu(z[t]))
    return torch.stack(outputs) @ mixer.out_proj.weight.T


def gla_by_definition(mixer: GLAMixer, hidden: Tensor) -> Tensor:
    heads = len(mixer.decay_bias) // mixer.key_dim
    outputs = torch.zeros(len(hidden), heads, mixer.value_dim, dtype=hidden.dtype)
    for head in range(heads):
        keys = slice(head * mixer.key_dim, (head + 1) * mixer.key_dim)
        values = slice(head * mixer.value_dim, (head + 1) * mixer.value_dim)
        state = torch.zeros(mixer.key_dim, mixer.value_dim, dtype=hidden.dtype)
        for t, x in enumerate(hidden):
            gate = mixer.decay_up.weight @ (mixer.decay_down.weight @ x) + mixer.decay_bias
            decay = (1 / (1 + (-gate).exp())) ** (1 / 16)
            k, v = mixer.k_proj.weight @ x, mixer.v_proj.weight @ x
            state = decay[keys, None] * state + torch.outer(k[keys], v[values])
            o = (mixer.q_proj.weight @ x)[keys] @ state / math.sqrt(mixer.key_dim)
            outputs[t, head] = o / (o.square().mean() + 1e-5).sqrt() * mixer.norm.weight
    return (outputs.flatten(1) * silu(hidden @ mixer.g_proj.weight.T)) @ mixer.out_proj.weight.T


def attention_by_definition(mixer: AttentionMixer, hidden: Tensor) -> Tensor:
    q, k, v = (hidden @ p.weight.T for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    outputs, half = torch.zeros_like(v), mixer.head_dim // 2
    for first in range(0, D_MODEL, mixer.head_dim):
        head = slice(first, first + mixer.head_dim)

        def turned(x: Tensor, t: int, head: slice = head) -> Tensor:
            """Pairs (i, i + half) as complex numbers, turned by t · theta^(−i/half)."""
            x = x[t, head]
            angles = torch.tensor([t * 10_000.0 ** (-i / half) for i in range(half)], dtype=x.dtype)
            pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
            return torch.cat((pairs.real, pairs.imag))

        for t in range(len(hidden)):
            scores = torch.stack([turned(q, t) @ turned(k, s) for s in range(t + 1)]) / math.sqrt(mixer.head_dim)
            outputs[t, head] = torch.softmax(scores, 0) @ v[: t + 1, head]
    return outputs @ mixer.out_proj.weight.T


CASES = {
    "mamba": (MambaMixer, MambaConfig(d_state=5), mamba_by_definition, 1e-11),
    "gla": (GLAMixer, GLAConfig(n_head=3, gate_rank=4), gla_by_definition, 1e-11),
    # Angles are fp32, as transformers' LLaMA has them.
    "attention": (AttentionMixer, AttentionConfig(head_dim=8), attention_by_definition, 1e-6),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_definition(name: str) -> None:
    build, config, definition, tolerance = CASES[name]
    torch.manual_seed(0)
    mixer, weights = shaken(build(config, D_MODEL, 3)), torch.randn(SEQLEN, D_MODEL, dtype=torch.float64)
    hidden = torch.randn(SEQLEN, D_MODEL, dtype=torch.float64, requires_grad=True)
    results = []
    for out in (mixer(hidden[None])[0], definition(mixer, hidden)):
        inputs = {"hidden": hidden, **dict(mixer.named_parameters())}
        gradients = torch.autograd.grad((out * weights).sum(), list(inputs.values()))
        results.append({"out": out.detach(), **dict(zip(inputs, gradients, strict=True))})
    for key, want in results[1].items():
        error = (results[0][key] - want).abs().max() / want.abs().max()
        assert error <= tolerance, (key, error)


def test_swiglu_is_added_to_the_stream_after_the_mixer() -> None:
    torch.manual_seed(0)
    config = ModelConfig(mixer=AttentionConfig(head_dim=8), vocab_size=50, d_model=D_MODEL, n_layer=1, d_ff=20)
    model = LanguageModel(config).double()
    ids = torch.arange(9)[None]
    block, x = model.blocks[0], model.embedding(ids)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x = x + block.mixer(norm(x, block.norm.weight))
    y = norm(x, block.mlp_norm.weight)
    x = x + (silu(y @ block.mlp.gate_proj.weight.T) * (y @ block.mlp.up_proj.weight.T)) @ block.mlp.down_proj.weight.T
    logits = norm(x, model.norm.weight) @ model.embedding.weight.T
    torch.testing.assert_close(model(ids)[..., :50], logits[..., :50], rtol=1e-10, atol=1e-10)


def test_initialisation() -> None:
    torch.manual_seed(0)
    mamba = MambaMixer(MambaConfig(), 256, 4)
    torch.testing.assert_close(-mamba.A_log.exp(), -torch.arange(1.0, 17.0).expand(512, 16))
    steps = nn.functional.softplus(mamba.dt_bias)
    assert 0.001 <= steps.min() < 0.0015 and 0.07 < steps.max() <= 0.1001  # log-uniform
    assert steps.log().mean().item() == pytest.approx(math.log(0.01), abs=0.15)
    model = LanguageModel(ModelConfig(mixer=AttentionConfig(), d_model=256, n_layer=2, d_ff=512))
    bound = 256**-0.5
    assert model.blocks[0].mixer.q_proj.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    # Two layers write to the stream four times.
    assert model.blocks[0].mixer.out_proj.weight.abs().max().item() == pytest.approx(bound / 2, rel=1e-3)
    assert model.blocks[0].mlp.down_proj.weight.abs().max().item() == pytest.approx(512**-0.5 / 2, rel=1e-3)


def test_keys_and_values_are_kept_without_copying_the_rest_each_token() -> None:
    mixer = AttentionMixer(AttentionConfig(head_dim=8), D_MODEL, 1)
    state, rooms = mixer.new_state(2), set()
    with torch.no_grad():
        for _ in range(100):
            mixer(torch.randn(2, 1, D_MODEL), state=state)
            rooms.add(state.keys.shape[1])
    assert state.length == 100 and sorted(rooms) == [1, 2, 4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (AttentionConfig(head_dim=10), r"model.mixer.head_dim=10 must be even and divide model.d_model=24"),
        (AttentionConfig(head_dim=3), r"model.mixer.head_dim=3 must be even"),
        (GLAConfig(n_head=5), r"model.mixer.expand_k × model.d_model = 12 must be a multiple of .*n_head=5"),
    ],
)
def test_sizes_that_do_not_divide_are_named(mixer: MixerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(ModelConfig(mixer=mixer, d_model=D_MODEL, n_layer=1))

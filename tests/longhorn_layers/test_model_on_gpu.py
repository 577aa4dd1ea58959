"""The language model on a GPU against the same model in float64 on the CPU (`make gpu-test`)."""

import copy

import pytest
import torch
from torch import Tensor

from longhorn_layers.config import AttentionConfig, GLAConfig, LonghornConfig, MambaConfig, ModelConfig
from longhorn_layers.model import LanguageModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"


MIXERS = {
    "longhorn": {"mixer": LonghornConfig()},
    "exact": {"mixer": LonghornConfig(update="exact")},
    "mamba": {"mixer": MambaConfig()},
    "gla": {"mixer": GLAConfig(n_head=2), "d_ff": 128},
    "llama": {"mixer": AttentionConfig(head_dim=32), "d_ff": 128},
}


def small_model(name: str = "longhorn") -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=300, d_model=96, n_layer=3, **MIXERS[name]))


def tokens(batch: int, seqlen: int) -> Tensor:
    return torch.randint(300, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.detach().cpu().double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 2e-5), (True, 1e-1)])  # bf16: wrong in kind
@pytest.mark.parametrize(("batch", "seqlen", "bounds"), [(2, 70, None), (1, 600, None), (1, 90, [0, 40, 40, 90])])
def test_loss_and_every_gradient(
    name: str, autocast: bool, tolerance: float, batch: int, seqlen: int, bounds: list[int] | None
) -> None:
    ids, cu_seqlens = tokens(batch, seqlen + 1), None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    exact = small_model(name)
    model = copy.deepcopy(exact).to(DEVICE)
    exact = exact.double()
    want = exact(ids[:, :-1], ids[:, 1:], cu_seqlens=cu_seqlens)
    want.backward()
    on_device = None if cu_seqlens is None else cu_seqlens.to(DEVICE)
    inputs, targets = ids[:, :-1].to(DEVICE), ids[:, 1:].to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss = model(inputs, targets, cu_seqlens=on_device)
    loss.backward()
    assert relative_error(loss, want.detach()) <= tolerance
    gradients = {n: p.grad for n, p in exact.named_parameters()}
    errors = {n: relative_error(p.grad, gradients[n]) for n, p in model.named_parameters()}
    assert all(error <= tolerance for error in errors.values()), errors  # NaN fails


@pytest.mark.parametrize("name", MIXERS)
def test_tokens_one_by_one_equal_the_whole_sequence(name: str) -> None:
    model = small_model(name).to(DEVICE)
    ids = tokens(3, 40).to(DEVICE)
    with torch.no_grad():
        whole = model(ids)
        state = model.new_state(3)
        first = model(ids[:, :25], state=state)
        rest = [model(ids[:, t : t + 1], state=state) for t in range(25, 40)]
    real = slice(0, 300)  # the padding's logits are -inf
    torch.testing.assert_close(torch.cat([first, *rest], 1)[..., real], whole[..., real], rtol=1e-4, atol=1e-4)

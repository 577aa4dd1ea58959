"""The remote code of an export: its numbers, its cache, fine-tuning, and loading from a folder."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longhorn_layers.hf import configuration_longhorn, modeling_gla, modeling_longhorn, recurrence, recurrent_lm
from longhorn_layers.hf.configuration_longhorn import LonghornConfig
from longhorn_layers.hf.modeling_longhorn import LonghornForCausalLM
from longhorn_layers.hf.recurrence import SCAN_CHUNK

UPDATES = ("diagonal", "exact")
ModelMaker = Callable[..., LonghornForCausalLM]
Padder = Callable[[list[Tensor]], tuple[Tensor, Tensor]]

# Sequences go through the kernels where they can be imported; test_hf_kernels.py holds those against what is held here.
pytestmark = pytest.mark.usefixtures("plain_pytorch")


def make_ids(batch: int, seqlen: int, seed: int = 1) -> Tensor:
    return torch.randint(67, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def mixer_oracle(weights: dict[str, Tensor], x: Tensor, update: str) -> Tensor:
    """The layer by its definition: one sequence (L, C), in float64, a loop over time."""
    n_state, rank = 5, weights["dt_head.weight"].shape[1]
    u_in, z = (x @ weights["in_proj.weight"].T).chunk(2, -1)
    conv, taps = weights["conv.weight"], weights["conv.weight"].shape[1]
    state = torch.zeros(u_in.shape[1], n_state, dtype=x.dtype)
    outputs = []
    for t in range(len(x)):
        u = weights["conv.bias"].clone()
        for back in range(min(taps, t + 1)):
            u += conv[:, taps - 1 - back] * u_in[t - back]
        u = u * torch.sigmoid(u)
        dt, k, q = (weights["x_proj.weight"] @ u).split([rank, n_state, n_state])
        beta = torch.sigmoid(weights["dt_head.weight"] @ dt + weights["dt_bias"])
        eps = (beta / (1 + beta * (k @ k)))[:, None]
        if update == "diagonal":
            state = (1 - eps * k**2) * state + eps * u[:, None] * k
        else:
            state = state @ torch.eye(n_state, dtype=x.dtype) - eps * torch.outer(state @ k, k)
            state = state + eps * u[:, None] * k
        outputs.append((state @ q + weights["D"] * u) * z[t] * torch.sigmoid(z[t]))
    return torch.stack(outputs) @ weights["out_proj.weight"].T


def logits_oracle(model: LonghornForCausalLM, ids: Tensor, update: str) -> Tensor:
    """(L,) ids -> (L, vocab) float64, differentiable in the parameters of a float64 model."""
    weights = {name: w.double() for name, w in model.state_dict(keep_vars=True).items()}
    x = weights["model.embedding.weight"][ids]
    for index in range(model.config.num_hidden_layers):
        prefix = f"model.blocks.{index}."
        mixer = {
            name.removeprefix(prefix + "mixer."): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix + "mixer.")
        }
        x = x + mixer_oracle(mixer, rms_norm(x, weights[prefix + "norm.weight"]), update)
    return rms_norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_definition(make_model: ModelMaker, update: str, tied: bool) -> None:
    model, ids = make_model(update, tie_word_embeddings=tied), make_ids(2, SCAN_CHUNK + 9)
    with torch.no_grad():
        expected = torch.stack([logits_oracle(model, row, update) for row in ids])
        single = model(ids).logits
        double = model.double()(ids).logits
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(double, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("training", [True, False])  # evaluation goes through the cache
def test_gradients_are_those_of_the_definition(make_model: ModelMaker, update: str, training: bool) -> None:
    model, ids = make_model(update).double().train(training), make_ids(1, SCAN_CHUNK + 9)
    direction = torch.randn(ids.shape[1], 67, dtype=torch.float64)
    losses = (
        (model(ids).logits * direction).sum(),
        (logits_oracle(model, ids[0], update) * direction).sum(),
    )
    parameters = dict(model.named_parameters())
    ours, expected = (torch.autograd.grad(loss, parameters.values()) for loss in losses)
    for name, gradient, oracle in zip(parameters, ours, expected, strict=True):
        assert oracle.norm() > 0, name
        assert (gradient - oracle).norm() <= 1e-9 * oracle.norm(), name


def test_updates_differ(make_model: ModelMaker) -> None:
    ids = make_ids(1, 20)
    first, second = (make_model(update)(ids).logits for update in UPDATES)
    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize("update", UPDATES)
@torch.no_grad()
def test_cached_pieces_equal_the_whole(make_model: ModelMaker, update: str) -> None:
    model, ids = make_model(update).double(), make_ids(2, 30)
    whole = model(ids, use_cache=False)
    assert whole.cache_params is None
    cache, pieces = None, []
    for piece in ids.split([1, 2, 20, 1, 6], dim=1):  # shorter than the convolution, and longer
        outputs = model(piece, cache_params=cache, use_cache=True)
        cache = outputs.cache_params
        pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, rtol=1e-10, atol=1e-10)
    cache.reset()
    again = model(ids, cache_params=cache, use_cache=True).logits
    torch.testing.assert_close(again, whole.logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}],
    ids=["greedy", "sample", "beam"],
)
def test_cached_generation_equals_uncached(make_model: ModelMaker, update: str, options: dict[str, object]) -> None:
    model, prompt = make_model(update), make_ids(2, 7)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(model.generate(prompt, max_new_tokens=24, use_cache=use_cache, **options))
    assert torch.equal(*texts)
    assert texts[0].shape == (2, 31)
    assert len(texts[0][0, 7:].unique()) > 5  # not one token over and over


@pytest.mark.parametrize("update", UPDATES)
@torch.no_grad()
def test_left_padding_changes_nothing(left_padded: Padder, make_model: ModelMaker, update: str) -> None:
    model = make_model(update).double()
    rows = [make_ids(1, seqlen, seqlen)[0] for seqlen in (3, 19, 8)]
    ids, mask = left_padded(rows)
    logits = model(ids, attention_mask=mask).logits
    for row, row_logits in zip(rows, logits, strict=True):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(row_logits[-len(row) :], alone, rtol=1e-10, atol=1e-10)
    unmasked = model(ids).logits[0, -3:]
    assert (unmasked - model(rows[0][None]).logits[0]).abs().max() > 0.01


def test_batched_generation_equals_single(left_padded: Padder, make_model: ModelMaker) -> None:
    model = make_model()
    rows = [make_ids(1, seqlen, seqlen)[0] for seqlen in (2, 13, 6)]
    ids, mask = left_padded(rows)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=16)[:, ids.shape[1] :]
    for row, generated in zip(rows, together, strict=True):
        alone = model.generate(row[None], max_new_tokens=16)[0, len(row) :]
        assert generated.tolist() == alone.tolist()


@torch.no_grad()
def test_mask_may_span_cached_tokens(left_padded: Padder, make_model: ModelMaker) -> None:
    model = make_model().double()
    rows = [make_ids(1, seqlen, seqlen)[0] for seqlen in (4, 12)]
    ids, mask = left_padded(rows)
    whole = model(ids, attention_mask=mask).logits
    cache = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True).cache_params
    rest = model(ids[:, 9:], attention_mask=mask, cache_params=cache, use_cache=True).logits
    torch.testing.assert_close(rest[:, :], whole[:, 9:], rtol=1e-10, atol=1e-10)


def test_loss_is_the_mean_over_shifted_labels(make_model: ModelMaker) -> None:
    model, ids = make_model(), make_ids(2, 12)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    outputs = model(ids, labels=labels)
    targets = labels[:, 1:]
    log_probs = outputs.logits[:, :-1].log_softmax(-1)
    kept = targets != -100
    picked = log_probs[kept].gather(1, targets[kept][:, None])
    torch.testing.assert_close(outputs.loss, -picked.mean())
    total = model(ids, labels=labels, num_items_in_batch=1).loss  # what Trainer accumulates with
    torch.testing.assert_close(total, -picked.sum())


def gradients(model: LonghornForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")  # since 5.23
def test_gradient_checkpointing_gives_the_same_gradients(make_model: ModelMaker, update: str, reentrant: bool) -> None:
    model, ids = make_model(update).double().train(), make_ids(2, SCAN_CHUNK + 9)
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed = gradients(model, ids)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_fine_tuning_lowers_the_loss(make_model: ModelMaker) -> None:
    model, ids = make_model().train(), make_ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@torch.no_grad()
def test_memory_of_inference_does_not_hold_a_state_per_token() -> None:
    """B*L*D*N numbers would be 16 MB here, one of B*L*D 256 KB."""
    batch, seqlen, channels, n_state = 1, 1024, 64, 64
    u = torch.rand(batch, seqlen, channels)
    k = torch.rand(batch, seqlen, n_state) / 8
    kept = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            if isinstance(result, Tensor):
                kept.append(result.numel())
            return result

    state = torch.zeros(batch, n_state, channels)
    with Recorder():
        modeling_longhorn.longhorn_scan(u, u, k, k, state, exact=False)
    assert max(kept) == batch * seqlen * channels


def test_initialisation() -> None:
    torch.manual_seed(0)
    config = LonghornConfig(vocab_size=500, hidden_size=64, num_hidden_layers=4)
    model = LonghornForCausalLM(config)
    assert (config.intermediate_size, config.time_step_rank) == (128, 4)
    mixer = model.model.blocks[0].mixer
    assert mixer.D.eq(1).all() and mixer.dt_bias.eq(0).all()
    assert model.model.norm.weight.eq(1).all()
    assert model.model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    bounds = {"in_proj": 64**-0.5, "conv": 0.5, "out_proj": (128 * 4) ** -0.5}
    for name, bound in bounds.items():
        largest = getattr(mixer, name).weight.abs().max().item()
        assert 0.9 * bound < largest <= bound, name
    assert model.lm_head.weight is model.model.embedding.weight


def test_wrong_arguments_are_refused(make_model: ModelMaker) -> None:
    with pytest.raises(ValueError, match='\'rank1\'.*"diagonal" or "exact"'):
        LonghornConfig(update_rule="rank1")
    model, ids = make_model(), make_ids(2, 6)
    with pytest.raises(ValueError, match=r"\(2, 5\), must be \(2, 6\)"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.model.embedding(ids))
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], assistant_model=make_model(), max_new_tokens=4)
    cache = model(ids, use_cache=True).cache_params
    for call in (model, model.model):
        with pytest.raises(ValueError, match="pass it as cache_params, not as past_key_values"):
            call(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="guidance_scale needs use_cache=False"):
        model.generate(ids, guidance_scale=2.0, max_new_tokens=4)


@torch.no_grad()
def test_guidance_without_a_cache(make_model: ModelMaker) -> None:
    """Classifier-free: what the prompt says, against the text without its beginning."""
    model, ids = make_model(), make_ids(2, 6)
    guided, alone = ids, ids[:, -1:]
    for _ in range(8):
        told, untold = (torch.log_softmax(model(text).logits[:, -1], -1) for text in (guided, alone))
        token = (untold + 3 * (told - untold)).argmax(-1, keepdim=True)
        guided, alone = torch.cat((guided, token), 1), torch.cat((alone, token), 1)
    options = {"max_new_tokens": 8, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, guidance_scale=3.0, use_cache=False, **options), guided)
    assert not torch.equal(model.generate(ids, use_cache=False, **options), guided)


def test_embeddings_hidden_states_and_kept_logits(make_model: ModelMaker) -> None:
    model, ids = make_model(), make_ids(2, 6)
    full = model(ids, output_hidden_states=True)
    assert len(full.hidden_states) == 4
    assert {(state.shape, state.dtype) for state in full.hidden_states} == {((2, 6, 24), torch.float32)}
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(embedded, full.logits)
    last_two = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last_two, full.logits[:, -2:])
    chosen = model(ids, logits_to_keep=torch.tensor([1, 4])).logits
    torch.testing.assert_close(chosen, full.logits[:, [1, 4]])
    as_tuple = model(ids, return_dict=False)
    assert torch.equal(as_tuple[0], full.logits)


def test_embeddings_can_be_resized(make_model: ModelMaker) -> None:
    model, ids = make_model(), make_ids(1, 6)
    before = model(ids).logits
    model.resize_token_embeddings(80)
    after = model(ids).logits
    assert after.shape == (1, 6, 80)
    torch.testing.assert_close(after[..., :67], before)


# ---- what a folder holds, and how it loads ----


@pytest.fixture
def export(make_model: ModelMaker, save_with_code: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder as an export is: weights, config.json with its auto_map, and the remote code."""
    return save_with_code(make_model("exact"), tmp_path / "export")


def test_the_file_holds_the_named_weights(export: Path) -> None:
    weights = load_file(export / "model.safetensors")
    mixer = {
        "in_proj.weight": (96, 24),
        "conv.weight": (48, 4),
        "conv.bias": (48,),
        "x_proj.weight": (12, 48),
        "dt_head.weight": (48, 2),
        "dt_bias": (48,),
        "D": (48,),
        "out_proj.weight": (24, 48),
    }
    expected = {"model.embedding.weight": (67, 24), "model.norm.weight": (24,)}
    for index in range(3):
        expected[f"model.blocks.{index}.norm.weight"] = (24,)
        expected |= {f"model.blocks.{index}.mixer.{name}": mixer[name] for name in mixer}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected


def test_untied_head_is_saved_and_loaded(make_model: ModelMaker, tmp_path: Path) -> None:
    model, ids = make_model(tie_word_embeddings=False), make_ids(1, 5)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].shape == (67, 24)
    loaded = LonghornForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.tensor([[int(i) for i in sys.argv[1].split()]])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not any(name.split(".")[0] in ("longhorn_layers", "kernels") for name in sys.modules)
    print("generated", *model.generate(ids, max_new_tokens=12)[0].tolist())
    model.train()(ids, labels=ids).loss.backward()
    print("trained", all(p.grad is not None for p in model.parameters()))
    model.save_pretrained(folder + "-again")
"""
SHARED_CODE = {"recurrent_lm.py", "recurrence.py"}


def test_a_folder_loads_offline_without_this_repository(
    make_model: ModelMaker, save_with_code: Callable[..., Path], tmp_path: Path
) -> None:
    ids = make_ids(1, 7)
    folders = {kind: save_with_code(make_model(kind), tmp_path / kind) for kind in ("exact", "gla")}
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", LOAD, " ".join(map(str, ids[0].tolist())), *map(str, folders.values())]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    said = [line.split() for line in result.stdout.splitlines()]
    expected = [[str(i) for i in make_model(kind).generate(ids, max_new_tokens=12)[0].tolist()] for kind in folders]
    assert [words[1:] for words in said if words[0] == "generated"] == expected
    assert [words[1:] for words in said if words[0] == "trained"] == [["True"]] * len(folders)
    for folder, name in zip(folders.values(), ("longhorn", "gla"), strict=True):
        code = {f"modeling_{name}.py", f"configuration_{name}.py", *SHARED_CODE}
        assert {path.name for path in folder.glob("*.py")} == code
        again = folder.with_name(folder.name + "-again")
        for file in code:  # saved again with its code
            assert (again / file).read_bytes() == (folder / file).read_bytes()


def imported(tree: ast.AST) -> Iterator[str]:
    """What transformers demands to be installed, relative imports as ".name"; not what is tried."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "").split(".")[0]
        elif not isinstance(node, ast.Try):
            yield from imported(node)


@pytest.mark.parametrize("module", [configuration_longhorn, modeling_longhorn, modeling_gla, recurrent_lm, recurrence])
def test_remote_code_imports_only_torch_and_transformers(module: ModuleType) -> None:
    path = Path(module.__file__ or "")
    names = set(imported(ast.parse(path.read_text())))
    beside = {name for name in names if name.startswith(".")}
    assert names - beside <= {"torch", "transformers"} | sys.stdlib_module_names
    assert all((path.parent / f"{name[1:]}.py").is_file() for name in beside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_keeps_what_needs_fp32(make_model: ModelMaker, export: Path, dtype: torch.dtype) -> None:
    model = LonghornForCausalLM.from_pretrained(export, dtype=dtype)
    kept = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    expected = {"model.norm.weight"}
    for index in range(3):
        prefix = f"model.blocks.{index}."
        expected |= {prefix + name for name in ("norm.weight", "mixer.D", "mixer.dt_bias")}
    assert kept == expected
    assert {weight.dtype for weight in model.parameters()} == {dtype, torch.float32}
    ids = make_ids(2, 40)
    outputs = model(ids, use_cache=True, output_hidden_states=True)
    assert outputs.logits.dtype == torch.float32
    assert outputs.hidden_states[1].dtype == torch.float32
    assert outputs.cache_params.layers[0].recurrent_states[0].dtype == torch.float32
    assert outputs.cache_params.layers[0].conv_states[0].dtype == dtype
    single = make_model("exact")(ids).logits
    relative = (outputs.logits - single).norm() / single.norm()
    assert relative < 0.05
    prompt = ids[:, :5]
    cached, uncached = (model.generate(prompt, max_new_tokens=8, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


def test_autocast_leaves_the_state_in_fp32() -> None:
    """The scan's inputs are rounded once; were its products too, 300 steps would be far off."""
    torch.manual_seed(0)
    u, k, q = torch.randn(1, 300, 8), torch.randn(1, 300, 4), torch.randn(1, 300, 4)
    arguments = (u, torch.full_like(u, 0.02), k, q, torch.zeros(1, 4, 8), True)
    expected = modeling_longhorn.longhorn_scan(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = modeling_longhorn.longhorn_scan(*arguments)
    assert torch.equal(y, expected[0]) and torch.equal(state, expected[1])

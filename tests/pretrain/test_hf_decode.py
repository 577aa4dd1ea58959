"""The benchmark of decoding in transformers: what it measures of both models, and what it records."""

import json
from pathlib import Path

import pytest
import torch

from longhorn_layers.config import ModelConfig
from pretrain.benchmarks import hf_decode
from pretrain.benchmarks.hf_decode import OURS, PEER, Comparison, Decoding, WrongLogits
from pretrain.benchmarks.llama import PARAMETER_TOLERANCE

CONFIG = """
model: {vocab_size: 8192, d_model: 64, n_layer: 4}
"""


@pytest.fixture
def models():  # type: ignore[no-untyped-def]
    return hf_decode.build(ModelConfig(vocab_size=8192, d_model=64, n_layer=4), 128)


def test_the_command_records_speed_and_memory_by_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG)
    sizes = ["--contexts", "64", "8", "--tokens", "3", "--repeats", "2", "--output", str(tmp_path)]
    assert hf_decode.main([str(config), *sizes]) == 0
    assert "tokens/s" in capsys.readouterr().out

    (file,) = tmp_path.glob("hf-decode-*.json")
    assert file.with_suffix(".png").stat().st_size > 10_000
    (found,) = json.loads(file.read_text())["results"]
    assert abs(found["parameters"][OURS] / found["parameters"][PEER] - 1) <= PARAMETER_TOLERANCE
    assert all(error <= hf_decode.TOLERANCE for error in found["error"].values())
    short, long = found["comparisons"]
    assert (short["context"], long["context"]) == (8, 64)
    for comparison in (short, long):
        speeds = [comparison["models"][name]["tokens_per_second"] for name in (OURS, PEER)]
        assert comparison["ratio"] == pytest.approx(speeds[0] / speeds[1], rel=1e-2)
        assert [len(comparison["models"][name]["median_ms_by_repeat"]) for name in (OURS, PEER)] == [2, 2]
    # fp32: 4 layers of 128 channels, 3 inputs of the convolution and 16 numbers of state each
    assert [c["models"][OURS]["cache_bytes"] for c in (short, long)] == [4 * 4 * 128 * (3 + 16)] * 2
    # 2 layers, keys and values of 64 numbers for each token read: all but the last that is written
    assert [c["models"][PEER]["cache_bytes"] for c in (short, long)] == [2 * 4 * 2 * 64 * (c + 3) for c in (8, 64)]


def test_both_go_on_with_the_text(models) -> None:  # type: ignore[no-untyped-def]
    """Longhorn's text is the one that `generate` writes after the whole prompt; the peer's cache is as long as it."""
    ready = hf_decode.contenders(models, 20)
    ids, state = ready[OURS].start()
    went_on = models[OURS].generate(ids, cache_params=state, max_new_tokens=6, do_sample=False)[0, 1:]
    prompt = torch.randint(8192, (1, 20), generator=torch.Generator().manual_seed(20))
    whole = models[OURS].generate(prompt, max_new_tokens=6, do_sample=False)[0, 20:]
    assert torch.equal(went_on, whole)
    assert ready[OURS].start()[1] is not state  # every turn has its own
    ids, cache = ready[PEER].start()
    assert (ids.shape, cache.get_seq_length()) == ((1, 20), 19)
    assert len(hf_decode.decode(ready[PEER], ids, cache, 5)) == 5
    assert cache.get_seq_length() == 19 + 6


def test_speed_is_the_median_tokens() -> None:
    found = {OURS: Decoding([[1.0, 9.0], [2.0]], 1, 1), PEER: Decoding([[4.0], [4.0, 40.0]], 1, 1)}
    assert found[OURS].tokens_per_second == 500.0
    assert Comparison(8, found).ratio == 2.0


def test_wrong_logits_are_not_timed(models, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    mixer = type(models[OURS].model.blocks[0].mixer)
    right = mixer._step_fused
    monkeypatch.setattr(mixer, "_step_fused", lambda self, *inputs: (1.1 * right(self, *inputs)[0], inputs[-1]))
    with pytest.raises(WrongLogits, match="Longhorn: logits after 24 tokens are off by"):
        hf_decode.check(OURS, models[OURS])


def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert hf_decode.main(["no-such.yaml"]) == 2
    assert "no-such.yaml" in capsys.readouterr().err

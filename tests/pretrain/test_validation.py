"""The validation loss of a run scores the same windows at every context, whatever the number of ranks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_tools.dataset import open_dataset
from longhorn_layers.config import AttentionConfig, GLAConfig, LonghornConfig, MambaConfig, MixerConfig, ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.checkpoint import load_model, read_manifest
from pretrain.config import Config, ConfigError, config_to_dict, load_config, validation_contexts
from pretrain.data import token_stream, windows
from pretrain.evaluation.losses import evaluate_contexts
from pretrain.metrics import MetricsLog
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.zero import ZeroEngine
from pretrain.trainer import Trainer
from pretrain.validation import ValidationLoss

CONTEXTS = [8, 64]  # besides 32: shorter and longer than the training context
ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("validation_worker.py")


class OneOfMany(Mesh):
    """A data-parallel rank without the others: what it would add to their sums is kept."""

    def all_reduce(self, values):  # type: ignore[no-untyped-def]
        self.sums.append(values)
        return [1.0] * len(values)

    sums: list[list[float]] = []


@pytest.fixture
def config(shard, tmp_path: Path) -> Config:  # type: ignore[no-untyped-def]
    config = Config(run_dir=str(tmp_path))
    config.model = ModelConfig(LonghornConfig(d_state=4), vocab_size=512, d_model=32, n_layer=1)
    config.data.valid, config.data.seqlen = shard.prefix, 32
    config.train.precision, config.train.global_batch_size, config.train.micro_batch_size = "fp32", 12, 2
    config.eval.tokens = 7 * 32 + 5
    return config


def plain_model(config: Config) -> LanguageModel:
    """As `build_model` draws it."""
    torch.manual_seed(config.train.seed)
    return LanguageModel(config.model)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_number_of_ranks_scores_the_same_seven_windows(config: Config, mesh: Mesh, ranks: int) -> None:
    model = plain_model(config)
    ids, targets = windows(token_stream(open_dataset(config.data.valid)), 32, range(7))
    with torch.no_grad():
        want = float(model(ids, targets))
    engine = ZeroEngine(model, config, mesh)
    OneOfMany.sums.clear()
    for rank in range(ranks):
        one = OneOfMany(**vars(mesh) | {"data_size": ranks, "data_rank": rank})
        assert ValidationLoss(config, one).measure(engine) == {32: 1 / (7 * 32)}
    assert sum(total for [total] in OneOfMany.sums) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_walk_the_same_number_of_forwards_at_every_context(config: Config, mesh: Mesh, ranks: int) -> None:
    """7 windows of 32, 3 of 64: ranks past the end run along. The longest are walked in parts of 32."""
    config.eval.contexts = CONTEXTS
    model = plain_model(config)
    stream = token_stream(open_dataset(config.data.valid))[:193]
    want = {result.context: result.nats for result in evaluate_contexts(model, stream, [8, 32, 64])}
    engine, calls = ZeroEngine(model, config, mesh), []
    model.register_forward_hook(lambda *_: calls.append(len(calls)))
    OneOfMany.sums.clear()
    forwards = set()
    for rank in range(ranks):
        calls.clear()
        one = OneOfMany(**vars(mesh) | {"data_size": ranks, "data_rank": rank})
        heard: list[int] = []
        ValidationLoss(config, one).measure(engine, lambda heard=heard: bool(heard.append(1)))
        assert len(heard) == len(calls)
        forwards.add(len(calls))
    assert len(forwards) == 1
    for number, context in enumerate(sorted(want)):
        total = sum(total for [total] in OneOfMany.sums[number::3])
        assert total == pytest.approx(want[context], rel=1e-5)


def test_a_stop_ends_it_between_forwards(config: Config, mesh: Mesh) -> None:
    config.eval.contexts = CONTEXTS
    engine, asked = ZeroEngine(plain_model(config), config, mesh), []
    assert ValidationLoss(config, mesh).measure(engine, lambda: len(asked) == 3 or bool(asked.append(1))) is None
    assert len(asked) == 3


TENSOR_PARALLEL, ZERO_3 = (2, 1), (1, 3)  # (tensor-parallel size, ZeRO stage) on two processes
LONGHORN, MAMBA = (LonghornConfig(d_state=4), 0), (MambaConfig(d_state=4), 0)  # and a SwiGLU's width
GLA, ATTENTION = (GLAConfig(), 64), (AttentionConfig(head_dim=8), 64)


@pytest.mark.parametrize(
    "cases",
    [
        [(*LONGHORN, *TENSOR_PARALLEL), (*LONGHORN, *ZERO_3), (*ATTENTION, *ZERO_3)],
        pytest.param(
            [(*mixer, *mesh) for mixer in (MAMBA, GLA, ATTENTION) for mesh in (TENSOR_PARALLEL, ZERO_3)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["main", "others"],
)
def test_two_processes_find_what_one_does(
    config: Config, tmp_path: Path, cases: list[tuple[MixerConfig, int, int, int]]
) -> None:
    """Tensor parallel, and ZeRO-3 over data-parallel ranks, whose parameters are gathered in each forward."""
    config.eval.contexts = CONTEXTS
    runs = []
    for mixer, d_ff, tensor, stage in cases:
        parallel = replace(config.parallel, tensor=tensor, zero_stage=stage)
        runs.append(replace(config, parallel=parallel, model=replace(config.model, mixer=mixer, d_ff=d_ff)))
    runs.append(replace(runs[1], train=replace(config.train, precision="autocast")))
    configs, output = tmp_path / "configs.json", tmp_path / "losses.json"
    configs.write_text(json.dumps([config_to_dict(case) for case in runs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(configs), str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    stream = token_stream(open_dataset(config.data.valid))[:193]
    for case, losses in zip(runs, json.loads(output.read_text()), strict=True):
        want = {r.context: r.loss for r in evaluate_contexts(plain_model(case), stream, validation_contexts(case))}
        tolerance = 1e-2 if case.train.precision == "autocast" else 1e-5
        assert {int(context): loss for context, loss in losses.items()} == pytest.approx(want, rel=tolerance), case


class Recorder:
    """What wandb was given."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def log(self, values: dict, step: int) -> None:
        self.lines.append(values | {"step": step})

    def finish(self) -> None:
        pass


def test_a_run_records_every_context(
    config: Config, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In metrics.jsonl and wandb, what `pretrain.evaluate` finds with the checkpoint of that step."""
    recorder = Recorder()
    monkeypatch.setattr(MetricsLog, "_start_wandb", lambda log: recorder)
    config.data.train, config.eval.contexts, config.eval.interval = config.data.valid, CONTEXTS, 2
    config.train.global_batch_size, config.train.total_tokens = 2, 2 * 2 * 32
    assert Trainer(config, mesh).run() == "done"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [line] = [line for line in lines if "validation_loss" in line]
    assert [logged for logged in recorder.lines if "validation_loss" in logged] == [line]
    model = load_model(tmp_path, torch.device("cpu")).model
    stream = token_stream(open_dataset(config.data.valid))[:193]
    found = {result.context: result for result in evaluate_contexts(model, stream, [8, 32, 64])}
    expected = {"step": 2, "validation_loss": found[32].loss}
    for context in CONTEXTS:
        expected[f"validation_loss_at_{context}"] = found[context].loss
        expected[f"validation_perplexity_at_{context}"] = found[context].perplexity
    assert line == pytest.approx(expected, rel=1e-5)
    assert f"validation loss {found[32].loss:.4f}  at 8: {found[8].loss:.4f}  at 64" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "checkpoints" / "step_00000002")
    assert manifest.validation_loss == line["validation_loss"]  # what keep_best goes by


def test_too_little_text_is_refused(config: Config, mesh: Mesh) -> None:
    config.eval.tokens = 60
    config.eval.contexts = CONTEXTS
    with pytest.raises(ConfigError, match="eval.tokens=60: no window of eval.contexts=64 fits"):
        ValidationLoss(config, mesh)
    config.eval.contexts, config.eval.tokens = [], 10
    with pytest.raises(ConfigError, match="no window of data.seqlen=32 fits"):
        ValidationLoss(config, mesh)


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ("[48]", "32 does not divide 48, the largest"),
        ("[64,100]", "32 does not divide 100"),
        ("[0]", r"eval.contexts=\[0\]: 0 does not divide 32"),
        ("[x]", "eval.contexts"),
    ],
)
def test_contexts_that_could_not_be_compared_are_refused(tmp_path: Path, contexts: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: {seqlen: 32}")
    assert validation_contexts(load_config(path, ["eval.contexts=[128,8]"])) == [8, 32, 128]
    with pytest.raises(ConfigError, match=message):
        load_config(path, [f"eval.contexts={contexts}"])

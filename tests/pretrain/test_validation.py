"""The validation loss of a run scores the same windows whatever the number of ranks."""

from pathlib import Path

import pytest
import torch

from data_tools.dataset import open_dataset
from longhorn_layers.config import ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain.config import Config, ConfigError
from pretrain.data import token_stream, windows
from pretrain.parallel.mesh import Mesh, init_mesh
from pretrain.parallel.zero import ZeroEngine
from pretrain.validation import ValidationLoss


class OneOfMany(Mesh):
    """A data-parallel rank without the others: what it would add to their sums is kept."""

    def all_reduce(self, values):  # type: ignore[no-untyped-def]
        self.sums.append(values)
        return [1.0, 1.0]

    sums: list[list[float]] = []


@pytest.fixture
def config(shard, tmp_path: Path) -> Config:  # type: ignore[no-untyped-def]
    config = Config(run_dir=str(tmp_path))
    config.model = ModelConfig(vocab_size=512, d_model=32, n_layer=1)
    config.data.valid, config.data.seqlen = shard.prefix, 32
    config.train.precision, config.train.global_batch_size, config.train.micro_batch_size = "fp32", 12, 2
    config.eval.tokens = 7 * 32 + 5
    return config


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_number_of_ranks_scores_the_same_seven_windows(config: Config, ranks: int) -> None:
    torch.manual_seed(0)
    model = LanguageModel(config.model)
    ids, targets = windows(token_stream(open_dataset(config.data.valid)), 32, range(7))
    with torch.no_grad():
        want = float(model(ids, targets))
    with init_mesh(1) as mesh:
        engine = ZeroEngine(model, config, mesh)
        OneOfMany.sums.clear()
        for rank in range(ranks):
            one = OneOfMany(**vars(mesh) | {"data_size": ranks, "data_rank": rank})
            ValidationLoss(config, one).measure(engine)
    totals, scored = zip(*OneOfMany.sums, strict=True)
    assert sum(scored) == 7 * 32
    assert sum(totals) == pytest.approx(want, rel=1e-5)


def test_too_little_text_is_refused(config: Config) -> None:
    config.eval.tokens = 10
    with init_mesh(1) as mesh, pytest.raises(ConfigError, match="no window of data.seqlen=32 fits"):
        ValidationLoss(config, mesh)

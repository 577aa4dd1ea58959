"""Config: layers, refusals that name the key, the batch arithmetic."""

from pathlib import Path

import pytest

from longhorn_layers.config import GLAConfig, LonghornConfig, MambaConfig
from pretrain.config import Config, ConfigError, config_from_dict, config_to_dict, load_config


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: somewhere\ntrain:\n  seed: 7\nmodel:\n  mixer:\n    d_state: 8\n")
    return path


def test_defaults_then_file_then_command_line(yaml: Path) -> None:
    config = load_config(yaml, ["train.seed=9", "parallel.tensor=2", "model.mixer.update=exact"])
    assert (config.run_dir, config.train.seed, config.parallel.tensor) == ("somewhere", 9, 2)
    assert config.model.mixer == LonghornConfig(d_state=8, update="exact")
    assert config.optim == Config().optim


def test_saved_configs_read_back_equal(yaml: Path) -> None:
    config = load_config(yaml, ["data.blend.web=0.25", "log.peak_tflops=1.5"])
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.sed=1", "unknown key 'train.sed'; did you mean 'train.seed'"),
        ("micro_batch=1", "unknown key 'micro_batch'; did you mean 'train.micro_batch_size'"),
        ("model.mixer.d_stat=4", "did you mean 'model.mixer.d_state'"),
        ("train.seed=abc", "train.seed.*'abc'.*Integer"),
        ("model.mixer.name=lstm", "model.mixer.name: 'lstm' is not one of"),
        ("train.precision=fp8", "train.precision must be one of autocast, bf16, fp32; got fp8"),
        ("parallel.zero_stage=0", "parallel.zero_stage must be one of 1, 2, 3; got 0"),
        ("data.blend.web=-1", r"data.blend.web must be a weight of 0 or more, got -1"),
        ("data.blend.web=nan", r"data.blend.web must be a weight of 0 or more, got nan"),
        ("data.blend.web=0", "data.blend: every weight is 0"),
        ("data.blend.web=much", r"data.blend.*much"),
        ("data.seqlen=0", "data.seqlen must be at least 1"),
        ("optim.min_lr=1", "optim.min_lr=1.0 is above optim.lr"),
        ("seed", "an override is written key=value"),
    ],
)
def test_refusals_name_the_key(yaml: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(yaml, [override])


def test_a_wrong_file_is_named(tmp_path: Path, yaml: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"launch/configs/1p3b\.yaml"):
        load_config(tmp_path / "none.yaml")
    yaml.write_text("train: {seed: 1")
    with pytest.raises(ConfigError, match="run.yaml: not a config"):
        load_config(yaml)
    yaml.write_text("train: {sed: 1}")
    with pytest.raises(ConfigError, match=r"run.yaml: unknown key 'train.sed'"):
        load_config(yaml)


def test_the_paper_run() -> None:
    config = load_config("launch/configs/1p3b.yaml")
    assert (config.tokens_per_step, config.total_steps) == (2_097_152, 47_684)
    assert config.grad_accum_steps(32) == 4
    with pytest.raises(ConfigError, match="24; nearest that are: 1008 or 1032"):
        config.grad_accum_steps(3)


def test_a_file_extends_another(tmp_path: Path, yaml: Path) -> None:
    (tmp_path / "sub").mkdir()
    longer = tmp_path / "sub" / "longer.yaml"
    longer.write_text("extends: ../run.yaml\ntrain: {total_tokens: 5}\nmodel: {mixer: {update: exact}}\n")
    config = load_config(longer, ["train.micro_batch_size=1"])
    assert (config.run_dir, config.train.seed, config.train.total_tokens) == ("somewhere", 7, 5)
    assert config.model.mixer == LonghornConfig(d_state=8, update="exact")
    yaml.write_text("extends: sub/longer.yaml\n")
    with pytest.raises(ConfigError, match="run.yaml: extends itself, by way of .*run.yaml → .*longer.yaml"):
        load_config(yaml)
    longer.write_text("extends: none.yaml\n")
    with pytest.raises(ConfigError, match="longer.yaml: extends none.yaml, but there is no file"):
        load_config(longer)
    yaml.write_text("train: {sed: 1}\n")
    longer.write_text("extends: ../run.yaml\n")
    with pytest.raises(ConfigError, match="run.yaml: unknown key 'train.sed'"):
        load_config(longer)


def test_another_mixer_starts_its_keys_anew(tmp_path: Path, yaml: Path) -> None:
    assert load_config(yaml, ["model.mixer.name=mamba"]).model.mixer == MambaConfig()  # not the file's d_state
    other = tmp_path / "other.yaml"
    other.write_text("extends: run.yaml\nmodel: {mixer: {name: gla, n_head: 2}}\n")
    assert load_config(other, ["model.mixer.gate_rank=4"]).model.mixer == GLAConfig(n_head=2, gate_rank=4)
    assert load_config(other, ["model.mixer.name=longhorn"]).model.mixer == LonghornConfig()
    with pytest.raises(ConfigError, match="other.yaml: unknown key 'model.mixer.d_state'"):
        other.write_text("extends: run.yaml\nmodel: {mixer: {name: gla, d_state: 2}}\n")
        load_config(other)


def test_a_mixer_that_does_not_fit_the_model_is_refused(yaml: Path) -> None:
    with pytest.raises(ConfigError, match="model.mixer.head_dim=64 must be even and divide model.d_model=96"):
        load_config(yaml, ["model.mixer.name=attention", "model.d_model=96"])
    with pytest.raises(ConfigError, match="model.d_ff must be at least 0"):
        load_config(yaml, ["model.d_ff=-1"])

"""Generation: the state gives what the whole text would, sampling, and the command."""

from pathlib import Path

import pytest
import torch

from data_tools.tokenizer import Tokenizer, TokenizerError
from data_tools.train_tokenizer import train_tokenizer
from longhorn_layers.config import LonghornConfig, ModelConfig
from longhorn_layers.model import LanguageModel
from pretrain import generate as generate_module
from pretrain.checkpoint import CheckpointError, LoadedModel
from pretrain.config import Config, DataConfig
from pretrain.generate import SEPARATOR, Sampling, generate, next_token, tokenizer_file

CORPUS = Path(__file__).parents[1] / "data" / "sotu_small.jsonl"
VOCAB_SIZE = 500  # padded to 512
GREEDY = Sampling(temperature=0)
NO_TOKEN = -1


def make_model(update: str = "diagonal") -> LanguageModel:
    """Random weights, untied so that the likeliest token is not simply the last one."""
    torch.manual_seed(1)
    mixer = LonghornConfig(d_state=4, update=update)
    model = LanguageModel(ModelConfig(mixer, VOCAB_SIZE, d_model=16, n_layer=2, tie_embeddings=False))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("_proj.weight", "dt_head.weight", "head.weight")):
                weight.mul_(4)
            elif name.endswith("embedding.weight"):
                weight.mul_(30)
    return model.eval()


@torch.inference_mode()
def recomputed(model: LanguageModel, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("update", ["diagonal", "exact"])
@pytest.mark.parametrize("prompt", [[7], [7, 300, 41, 8, 90, 2, 11]])
def test_greedy_with_the_state_equals_recomputation(update: str, prompt: list[int]) -> None:
    model = make_model(update)
    expected = recomputed(model, prompt, 30)
    assert len(set(expected)) > 5  # no fixed point, which a lost state would reach as well
    assert generate(model, prompt, 30, NO_TOKEN, GREEDY) == expected


def test_it_stops_at_eos_and_leaves_it_out() -> None:
    model = make_model()
    expected = recomputed(model, [7, 8], 30)
    eos_id = expected[10]
    first = expected.index(eos_id)
    assert generate(model, [7, 8], 30, eos_id, GREEDY) == expected[:first]
    assert generate(model, [7, 8], 0, NO_TOKEN, GREEDY) == []


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens; begin with EOS"):
        generate(make_model(), [], 5, NO_TOKEN, GREEDY)


# ---- sampling ----


def draws(logits: torch.Tensor, sampling: Sampling, count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    tokens = [next_token(logits, sampling, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


LOGITS = torch.tensor([0.1, 0.5, 0.0, 0.25, 0.15]).log()  # −inf where it is 0, as padding is


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.5, 0, 0.25, 0.15]),
        (
            Sampling(temperature=0.5),
            [0.01 / 0.345, 0.25 / 0.345, 0, 0.0625 / 0.345, 0.0225 / 0.345],
        ),
        (Sampling(top_k=2), [0, 2 / 3, 0, 1 / 3, 0]),
        (Sampling(top_k=99), [0.1, 0.5, 0, 0.25, 0.15]),
        (Sampling(top_p=0.8), [0, 0.5 / 0.9, 0, 0.25 / 0.9, 0.15 / 0.9]),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(top_k=2, top_p=0.6), [0, 1, 0, 0, 0]),  # top_p of what top_k leaves
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
    ],
)
def test_sampling_follows_the_distribution(sampling: Sampling, expected: list[float]) -> None:
    found = draws(LOGITS, sampling)
    wanted = torch.tensor(expected, dtype=torch.float32)
    assert torch.equal(found == 0, wanted == 0)
    # 4000 draws: three standard deviations are at most 0.024.
    torch.testing.assert_close(found, wanted, atol=0.024, rtol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_k": 0}, "top-k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top-p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_senseless_sampling_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_the_padding_of_the_vocabulary_is_never_drawn() -> None:
    model = make_model()
    hot = Sampling(temperature=1e6)  # every token is as likely as the next
    generator = torch.Generator().manual_seed(0)
    tokens = generate(model, [5], 400, NO_TOKEN, hot, generator)
    assert 450 < max(tokens) < VOCAB_SIZE


def test_the_seed_decides() -> None:
    model = make_model()
    first, again, other = (
        generate(model, [5], 20, NO_TOKEN, Sampling(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


# ---- the command ----


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.tokenizer.model"
    path.write_bytes(train_tokenizer([CORPUS], vocab_size=VOCAB_SIZE))
    return path


@pytest.fixture
def loaded(tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    tokenizer, model = Tokenizer.load(tokenizer_path), make_model()
    found = LoadedModel(
        model=model,
        config=Config(model=model.config, data=DataConfig(train=str(tokenizer_path.parent / "train"))),
        step=30,
        consumed_tokens=1000,
        tokenizer={"name": tokenizer.name, "sha256": tokenizer.sha256},
        path=Path("run/checkpoints/step_00000030"),
    )
    monkeypatch.setattr(generate_module, "load_any", lambda checkpoint, device: found)
    return found


def run(*arguments: str) -> int:
    return generate_module.main(["run", "--device=cpu", "--tokens=12", *arguments])


def test_each_prompt_is_continued_by_itself(
    loaded: LoadedModel, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "The Union", "--prompt", "", "--temperature", "0") == 0
    shown = capsys.readouterr()
    tokenizer = Tokenizer.load(tokenizer_path)
    expected = []
    for ids in (tokenizer.encode("The Union"), [tokenizer.eos_id]):
        following = generate(loaded.model, ids, 12, tokenizer.eos_id, GREEDY)
        expected.append(tokenizer.decode(ids + following))
    assert shown.out == f"{expected[0]}\n{SEPARATOR}{expected[1]}\n"
    assert shown.out.startswith("The Union") and shown.err == ""


def test_a_prompts_text_does_not_depend_on_the_others(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "We", "--prompt", "The", "--seed", "4") == 0
    both = capsys.readouterr().out
    assert run("--prompt", "The", "--seed", "4") == 0
    assert both.split(f"\n{SEPARATOR}")[1] == capsys.readouterr().out


def test_ids_beyond_the_tokenizers_pieces_give_no_text(
    loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model's vocabulary may be larger than its tokenizer's."""
    smaller = tmp_path / "smaller.model"
    smaller.write_bytes(train_tokenizer([CORPUS], vocab_size=360))
    loaded.tokenizer["sha256"] = Tokenizer.load(smaller).sha256
    hot = ("--temperature", "1e6", "--tokens", "40", "--tokenizer", str(smaller))
    assert run("--prompt", "We", *hot) == 0
    assert capsys.readouterr().out.startswith("We")


def test_a_missing_tokenizer_is_named(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.config.data.train = str(tmp_path / "gone")
    with pytest.raises(TokenizerError, match=r"gone.tokenizer.model: .* --tokenizer"):
        tokenizer_file(loaded, None)
    with pytest.raises(TokenizerError, match=r"other\.model"):
        tokenizer_file(loaded, str(tmp_path / "other.model"))


def test_another_tokenizer_is_refused(loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer([CORPUS], vocab_size=VOCAB_SIZE - 1))
    assert run("--prompt", "We", "--tokenizer", str(other)) == 1
    shown = capsys.readouterr()
    assert f"error: {other}: its sha256 is " in shown.err
    assert loaded.tokenizer["sha256"] in shown.err and shown.out == ""


def test_faults_end_with_one_line(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "We", "--top-p", "2") == 1
    assert capsys.readouterr().err == "error: top-p must be above 0 and at most 1, got 2.0\n"

    def load(checkpoint: Path, device: torch.device) -> LoadedModel:
        raise CheckpointError(f"{checkpoint}: neither a run nor a checkpoint")

    monkeypatch.setattr(generate_module, "load_any", load)
    assert run("--prompt", "We") == 1
    assert capsys.readouterr().err == "error: run: neither a run nor a checkpoint\n"

"""A tokenizer trained on the suite's own text, and makers of the files that the tests read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_tools.tokenizer import Tokenizer
from data_tools.train_tokenizer import train_tokenizer

CORPUS = Path(__file__).parents[1] / "data" / "sotu_small.jsonl"


@pytest.fixture(scope="session")
def corpus() -> Path:
    return CORPUS


@pytest.fixture(scope="session")
def records() -> list[dict]:
    return [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe600.model"
    path.write_bytes(train_tokenizer([CORPUS], vocab_size=600))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_file)


@pytest.fixture
def input_folder(tmp_path: Path, records: list[dict]) -> Callable[..., Path]:
    """Writes the corpus as `files` .jsonl.zst files of ever more documents, `repeat` times each."""

    def write(files: int = 4, repeat: int = 1) -> Path:
        folder = tmp_path / "input"
        folder.mkdir()
        share = len(records) // files
        for index in range(files):
            part = records[: share * (index + 1)] if repeat > 1 else records[index * share :][:share]
            lines = "".join(json.dumps(record) + "\n" for record in part * repeat)
            (folder / f"{index}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        return folder

    return write

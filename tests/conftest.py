"""What tests of several rooms share: a real shard of the suite's own text."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

# The CPU suite, also on a machine with GPUs, whose processes would each want one of them; set it to test a GPU.
# Before torch is imported.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from data_tools.tokenize import tokenize
from data_tools.train_tokenizer import train_tokenizer

TEXT = Path(__file__).parent / "data" / "sotu_small.jsonl"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-golden", action="store_true", help="write tests/golden/losses.json anew")


@dataclass(frozen=True)
class Shard:
    """A tokenizer of 512 pieces trained on the suite's text, and the text as a shard."""

    tokenizer: Path
    prefix: str


@pytest.fixture(scope="session")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    folder = tmp_path_factory.mktemp("shard")
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(train_tokenizer([TEXT], 512))
    tokenize([str(TEXT)], str(tokenizer), folder / "shard", workers=1)
    return Shard(tokenizer, str(folder / "shard"))

"""What training batches hold, on any number of ranks; files that change; validation streams."""

import gc
import os
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools.dataset import Dataset, Source, open_dataset
from data_tools.index import write_index
from data_tools.shards import ShardError, ShardFiles
from pretrain import data as data_module
from pretrain import shard_reader
from pretrain.config import Config, ConfigError
from pretrain.data import TrainingData, document_bounds, document_lengths, token_stream, windows
from pretrain.packing import measure_packing
from pretrain.parallel.mesh import init_mesh
from pretrain.shard_reader import ShardChanged

EOS = 2


def make_data(prefix: str, ranks: int = 1, rank: int = 0, blend: dict | None = None, **train: int) -> TrainingData:  # type: ignore[type-arg]
    """One data-parallel rank's view."""
    config = Config()
    config.model.vocab_size, config.data.train, config.data.seqlen = 512, prefix, 32
    config.data.blend = blend or {}
    config.train.global_batch_size, config.train.micro_batch_size = 12, 2
    config.train.total_tokens = 40 * 12 * 32
    for name, value in train.items():
        setattr(config.train, name, value)
    with init_mesh(1) as mesh:
        return TrainingData(config, replace(mesh, data_size=ranks, data_rank=rank))


def step_rows(views: list[TrainingData], step: int) -> list[list[int]]:
    """The rows of a step's global batch, in an order of their own."""
    return sorted(row for view in views for batch in view.micro_batches(step) for row in batch["input_ids"].tolist())


@pytest.fixture
def sources(shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:  # type: ignore[no-untyped-def]
    """Two sources with shards of their own numbers: web 10000…, books 20000…; `open_dataset` gives them."""
    made = []
    for name, first, shards in (("books", 20_000, [161, 20]), ("web", 10_000, [330, 97, 1000])):
        files = []
        for number, tokens in enumerate(shards):
            base = tmp_path / f"{name}-{number}"
            np.arange(first, first + tokens, dtype="<u2").tofile(f"{base}.bin")
            lengths = np.diff([*range(0, tokens, 50), tokens])
            write_index(Path(f"{base}.idx"), np.dtype("<u2"), lengths)
            files.append(ShardFiles(Path(f"{base}.bin"), Path(f"{base}.idx"), len(lengths), tokens))
            first += tokens
        made.append(Source(name, sum(f.documents for f in files), sum(shards), tuple(files)))
    plain = open_dataset(shard.prefix)
    dataset = replace(plain, path=tmp_path, digest="d" * 64, sources=tuple(made))
    monkeypatch.setattr(data_module, "open_dataset", lambda path: dataset)
    return dataset


@pytest.fixture
def copy(shard, tmp_path: Path) -> str:  # type: ignore[no-untyped-def]
    """The shard, for a test to damage."""
    for file in Path(shard.prefix).parent.glob(f"{Path(shard.prefix).name}.*"):
        shutil.copy(file, tmp_path / file.name)
    return str(tmp_path / Path(shard.prefix).name)


@pytest.mark.parametrize(("ranks", "size"), [(1, 12), (2, 3), (3, 4), (4, 1)])
def test_every_topology_sees_the_same_global_batches(shard, ranks: int, size: int) -> None:  # type: ignore[no-untyped-def]
    alone = [make_data(shard.prefix)]
    several = [make_data(shard.prefix, ranks, rank, micro_batch_size=size) for rank in range(ranks)]
    for step in (0, 1, 39):
        assert step_rows(alone, step) == step_rows(several, step)
    assert step_rows(alone, 0) != step_rows(alone, 1)


def test_a_step_is_the_same_whatever_came_before_and_however_long_the_run(shard) -> None:  # type: ignore[no-untyped-def]
    walked, longer = make_data(shard.prefix), make_data(shard.prefix, total_tokens=10**9)
    batches = [step_rows([walked], step) for step in range(30)]
    assert batches[29] == step_rows([longer], 29) and batches[7] == step_rows([longer], 7)
    assert batches[0] != step_rows([make_data(shard.prefix, seed=2)], 0)


def test_an_epoch_is_megatrons_tokens_cut_into_windows(shard) -> None:  # type: ignore[no-untyped-def]
    """Each window once, and next tokens as targets, out of the same files by another reader."""
    dataset = IndexedDataset(shard.prefix)
    stream = np.concatenate([dataset[i] for i in range(len(dataset))]).astype(np.int64)
    count = (len(stream) - 1) // 32
    data, rows = make_data(shard.prefix, global_batch_size=1, micro_batch_size=1), []
    for step in range(count):
        [batch] = data.micro_batches(step)
        rows.append([*batch["input_ids"][0].tolist(), int(batch["targets"][0, -1])])
        assert torch.equal(batch["input_ids"][:, 1:], batch["targets"][:, :-1])
    assert sorted(rows) == sorted(stream[i * 32 : i * 32 + 33].tolist() for i in range(count))
    second = [data.micro_batches(count + step)[0]["input_ids"][0].tolist() for step in range(20)]
    assert second != [row[:-1] for row in rows[:20]]


def test_windows_of_a_source_stay_inside_its_shards(sources: Dataset) -> None:
    """5 + 0 windows of books, 10 + 3 + 31 of web, each once an epoch of 49 samples."""
    data = make_data("folder", global_batch_size=49, micro_batch_size=49)
    for step in range(3):
        [batch] = data.micro_batches(step)
        starts = sorted(batch["input_ids"][:, 0].tolist())
        assert torch.equal(batch["targets"] - batch["input_ids"], torch.ones_like(batch["targets"]))
        web = [10_000, 10_330, 10_427]
        want = [first + 32 * i for first, n in zip(web, (10, 3, 31), strict=True) for i in range(n)]
        assert starts == want + [20_000 + 32 * i for i in range(5)]


def test_a_blend_has_its_weights(sources: Dataset) -> None:
    data = make_data("folder", blend={"books": 3, "web": 1})
    counts = Counter("books" if row[0] >= 20_000 else "web" for step in range(40) for row in step_rows([data], step))
    assert counts == {"books": 360, "web": 120}
    lines = list(data.description())
    assert "source books: 75.00% of the samples, 72 epochs" in lines
    assert "source web: 25.00% of the samples, 2.73 epochs" in lines
    only = make_data("folder", blend={"books": 0, "web": 1})
    assert only.order.blend.weights == {"web": Fraction(1)}


def test_the_documents_of_a_step_are_named_by_source_and_shard(sources: Dataset) -> None:
    """In shards of documents of 50 tokens, token t is of document t // 50."""
    data = make_data("folder")
    want: dict[str, set[int]] = {}
    for batch in data.micro_batches(5):
        for row, last in zip(batch["input_ids"].tolist(), batch["targets"][:, -1].tolist(), strict=True):
            bases = {"web-0": 10_000, "web-1": 10_330, "web-2": 10_427, "books-0": 20_000}
            shard = max((b, s) for s, b in bases.items() if b <= row[0])[1]
            want.setdefault(shard, set()).update((token - bases[shard]) // 50 for token in (*row, last))
    found = data.documents(5)
    assert {f.shard: set(f.documents) for f in found} == want
    assert {(f.source, f.shard.partition("-")[0]) for f in found} == {("books", "books"), ("web", "web")}


def test_no_more_files_are_open_than_allowed(sources: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "MOST_OPEN", 2)
    data, files = make_data("folder"), {str(s.bin) for source in sources.sources for s in source.shards}

    def opened() -> int:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link) in files for link in links if link.is_symlink())

    for step in range(10):
        data.micro_batches(step)
        assert opened() == 2
    del data
    gc.collect()
    assert opened() == 0


def test_a_cut_file_is_an_error(copy: str) -> None:
    data = make_data(copy)
    data.micro_batches(0)
    os.truncate(f"{copy}.bin", 100)
    with pytest.raises(ShardChanged, match=r"shard\.bin was cut: it ends before token \d+"):
        data.micro_batches(1)


@pytest.mark.parametrize("change", ["replaced", "touched", "removed"])
def test_a_changed_file_is_an_error(copy: str, change: str) -> None:
    data, path = make_data(copy), Path(f"{copy}.bin")
    if change == "replaced":
        path.with_suffix(".new").write_bytes(path.read_bytes() + b"..")
        path.with_suffix(".new").rename(path)
    elif change == "touched":
        os.utime(path, ns=(0, 0))
    data.micro_batches(0) if change == "removed" else None
    if change == "removed":
        path.unlink()
    with pytest.raises(ShardChanged, match=r"shard\.bin changed while it was read: \(size, mtime\) was \("):
        data.micro_batches(1)


def test_a_stream_of_a_cut_file_is_an_error(copy: str) -> None:
    dataset = open_dataset(copy)
    os.truncate(f"{copy}.bin", 100)
    with pytest.raises(ShardError, match=r"shard\.bin was cut: it has 50 tokens of"):
        token_stream(dataset)


def test_a_stream_has_every_sources_share(sources: Dataset) -> None:
    everything = token_stream(sources)
    assert everything.tolist() == [*range(20_000, 20_181), *range(10_000, 11_427)]
    assert int(document_lengths(sources).sum()) == len(everything) == 181 + 1427
    part = token_stream(sources, 804)
    assert part.tolist() == [*range(20_000, 20_090), *range(10_000, 10_714)]


def test_packing_counts_what_windows_cut(sources: Dataset) -> None:
    """Documents of 50 tokens in windows of 32: counted here token by token."""
    packing = measure_packing(sources.sources, 32)
    cut = continued = 0
    for source in sources.sources:
        for shard in source.shards:
            token = np.arange(shard.tokens)
            later = token // 32 > (token // 50 * 50) // 32
            continued += int(later.sum())
            cut += len(set((token // 50)[later].tolist()))
    assert (packing.cut, packing.continued) == (cut, continued)
    assert (packing.windows, packing.dropped) == (49, 1608 - 49 * 32)
    assert (packing.documents, packing.seen) == (sources.documents, sources.documents)
    part = measure_packing(sources.sources, 32, most_documents=16)
    assert part.seen < part.documents and "of the first" in part.line and "0% padded" in part.line


def test_resets_at_eos_lay_the_micro_batch_flat(shard) -> None:  # type: ignore[no-untyped-def]
    count = len(make_data(shard.prefix).sources["all"])  # an epoch: it has every document's end
    data = make_data(shard.prefix, global_batch_size=count, micro_batch_size=count)
    [rows] = data.micro_batches(0)
    data.config.data.reset_at_eos = True
    [batch] = data.micro_batches(0)
    assert batch["input_ids"].shape == batch["targets"].shape == (1, count * 32)
    want = {32 * row for row in range(count + 1)}
    want |= {32 * row + i + 1 for row, i in (rows["input_ids"] == EOS).nonzero().tolist()}
    assert batch["cu_seqlens"].tolist() == sorted(want) and len(want) > count + 1


def test_document_bounds() -> None:
    ids = torch.tensor([[5, 2, 7, 8], [2, 2, 9, 2]])
    assert document_bounds(ids, eos_id=2).tolist() == [0, 2, 4, 5, 6, 8]
    assert document_bounds(ids, eos_id=2).dtype == torch.int32


def test_windows_predict_every_token_once_at_any_context() -> None:
    stream = np.arange(65, dtype=np.uint16)
    for context in (8, 16, 64):
        ids, targets = windows(stream, context, range(64 // context))
        assert ids.dtype == torch.int64
        assert ids.flatten().tolist() == list(range(64)) and targets.flatten().tolist() == list(range(1, 65))


def test_wrong_data_is_named(shard) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="data.train is not set"):
        make_data("")
    config = Config()
    config.model.vocab_size, config.data.train = 100, shard.prefix
    with init_mesh(1) as mesh:
        with pytest.raises(ConfigError, match="set model.vocab_size=512"):
            TrainingData(config, mesh)
        config.model.vocab_size, config.data.seqlen = 512, 10**7
        with pytest.raises(ConfigError, match="no window of data.seqlen=10000000 fits in any shard"):
            TrainingData(config, mesh)


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        ({"wiki": 1.0}, "data.blend: no source 'wiki' in folder; it has books, web"),
        ({"books": 1.0, "tiny": 1.0}, "data.blend: no source 'tiny'"),
    ],
)
def test_blends_of_what_is_not_there_are_refused(sources: Dataset, blend: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_data("folder", blend=blend)


def test_a_source_too_short_for_a_window_is_refused_where_it_has_a_weight(
    sources: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    books, web = sources.sources
    short = replace(books, tokens=20, shards=books.shards[1:])
    monkeypatch.setattr(data_module, "open_dataset", lambda path: replace(sources, sources=(short, web)))
    with pytest.raises(ConfigError, match="fits in any shard of source 'books'; take it out of data.blend"):
        make_data("folder", blend={"books": 0.5, "web": 0.5})
    assert list(make_data("folder").order.sources) == ["web"]

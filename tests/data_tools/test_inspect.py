import pytest

from data_tools.inspect import main
from data_tools.tokenize import tokenize


@pytest.fixture(scope="module")
def shard(tmp_path_factory, corpus, tokenizer_file):
    prefix = tmp_path_factory.mktemp("shard") / "train"
    tokenize([str(corpus)], str(tokenizer_file), str(prefix), workers=1)
    return prefix


def test_it_shows_counts_sets_and_a_decoded_sample(shard, tokenizer, records, capsys):
    assert main([str(shard), "--verify", "--sample", "2"]) == 0

    output = capsys.readouterr().out
    lengths = [len(tokenizer.encode(record["text"])) + 1 for record in records]
    assert f"12 documents, {sum(lengths):,} tokens (uint16), 1 source files" in output
    assert f"longest {max(lengths):,} (document {lengths.index(max(lengths))})" in output
    assert "StateOfTheUnionSpoken" in output and "StateOfTheUnionWritten" in output
    for record in (records[0], records[-1]):
        assert record["text"][:60] in output
    assert "verified" in output


def test_verify_fails_on_a_flipped_byte(shard, capsys):
    path = shard.with_suffix(".bin")
    content = path.read_bytes()
    try:
        path.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])

        assert main([str(shard), "--verify"]) == 1
        assert f"error: {path}: sha256 is " in capsys.readouterr().err
        assert main([str(shard)]) == 0  # without --verify nothing is recomputed
    finally:
        path.write_bytes(content)


def test_a_prefix_without_a_shard_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--verify"]) == 1
    assert "none.manifest.json does not exist" in capsys.readouterr().err

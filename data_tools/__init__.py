"""From text files to token shards: readers, tokenizer, shard format, and their commands.

Commands, run from the repository's root: ``python -m data_tools.demo_corpus``,
``.train_tokenizer``, ``.tokenize`` and ``.inspect``. The shards are Megatron's ``.bin``/``.idx``
with a manifest beside them (``shards.py``).
"""

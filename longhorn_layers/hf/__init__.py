"""What an export to Hugging Face is made of: the remote code it ships, the tokenizer it writes.

`configuration_*.py`, `modeling_*.py` and what these import from beside them (`recurrent_lm.py`, `recurrence.py`) are
copied into exports as they are. They need torch and transformers (>= 5.17) alone; this repository's kernels are used
where they can be imported.
"""

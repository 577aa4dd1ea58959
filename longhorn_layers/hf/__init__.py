"""What an export to Hugging Face is made of: the remote code it ships, the tokenizer it writes.

`configuration_longhorn.py` and `modeling_longhorn.py` are copied into every export as they are, so
they import torch and transformers (>= 5.17) and nothing of this repository.
"""

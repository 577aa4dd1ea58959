"""A model's losses on held-out text: at several contexts, by position in the context, and how they are shown.

losses      windows of a token stream through a model    documents   which tokens of a dataset are scored
text_bytes  how much text those tokens are               report      perplexity.json, the tables
figures     the plots                                    published   the paper's curves
comparison  several reports in one
"""

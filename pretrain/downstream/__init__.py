"""Downstream tasks through lm-eval: `python -m pretrain.evaluate SOURCE --tasks piqa,hellaswag`.

tasks     which tasks there are; a folder of one's own       model     a LanguageModel as lm-eval sees one; BOS and EOS
text      a model's tokenizer, what begins a text            command   options, running, going on after a kill
results   what is kept of lm-eval's results, the table
"""

from pretrain.downstream.command import add_arguments, run
from pretrain.downstream.tasks import Requested, load_tasks

__all__ = ["Requested", "add_arguments", "load_tasks", "run"]

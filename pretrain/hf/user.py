"""What a user does with an export: a program of its own, run where this repository can't be imported.

    python -P user.py FOLDER code|no-code TEXT LENGTHS STEPS RESULT

It loads the folder through transformers' Auto classes in fp32, and writes to RESULT (safetensors), for texts that are
the first so many tokens of TEXT, one for each of LENGTHS (like 1,7,128):

    ids           of the whole TEXT, (tokens,)
    alone.{i}     logits of each text by itself, (its tokens, vocab_size)
    padded        logits of all of them as a batch, padded on the left, (texts, longest, vocab_size)
    generated     what greedy decoding adds to that batch, (texts, STEPS)
    steps         the logits that each of these tokens was chosen by, (texts, STEPS, vocab_size)
"""

import sys
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def main(folder: str, code: str, text: str, lengths: str, steps: str, result: str) -> None:
    trusted = code == "code"  # what transformers has the code of must load without trust
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted, dtype=torch.float32)
    with open(text, encoding="utf-8", newline="") as file:
        ids = tokenizer(file.read())["input_ids"]
    rows = [ids[: int(length)] for length in lengths.split(",")]
    found = {f"alone.{i}": model(torch.tensor([row])).logits[0] for i, row in enumerate(rows)}
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    written = model.generate(
        **batch,
        do_sample=False,
        min_new_tokens=int(steps),
        max_new_tokens=int(steps),
        return_dict_in_generate=True,
        output_logits=True,
    )
    found["ids"] = torch.tensor(ids)
    found["padded"] = model(**batch).logits
    found["generated"] = written.sequences[:, -int(steps) :].contiguous()
    found["steps"] = torch.stack(written.logits, 1)
    save_file(found, result)


if __name__ == "__main__":
    main(*sys.argv[1:])

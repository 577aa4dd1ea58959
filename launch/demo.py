"""The whole path on a real corpus: text → shards → training → perplexity vs context → Hugging Face → text.

    make demo             what is done already is reused, an interrupted training resumes
    make demo FRESH=1     start over

Every stage is one of the project's own commands, printed before it runs.
"""

import argparse
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.console import Console

from data_tools.shards import Manifest, ShardPaths
from data_tools.tokenizer import Tokenizer

CONFIG = Path("launch/configs/demo.yaml")
FOLDER = Path("demo")
CORPUS, TOKENIZER, SHARDS = FOLDER / "corpus", FOLDER / "tokenizer.model", FOLDER / "shards"
RUN, HF = FOLDER / "run", FOLDER / "hf"
CONTEXTS = (512, 1024, 2048, 4096, 8192)
EVALUATED_TOKENS = 8 * max(CONTEXTS)  # of each document set: a minute on two cores
PROMPT = "The state of the Union"
SAMPLE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
torch.manual_seed(0)
inputs = tokenizer(prompt, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.8, top_k=50)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="remove what earlier runs made")
    if parser.parse_args().fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    console, start = Console(highlight=False, soft_wrap=True), time.perf_counter()
    try:
        make_shards(console)
        train(console)
        evaluation = evaluate(console)
        sample = export_and_sample(console)
    except subprocess.CalledProcessError as error:
        console.print(f"the demo stopped: {shlex.join(map(str, error.cmd[1:]))} exited with {error.returncode}")
        return 1
    report(console, evaluation, sample, time.perf_counter() - start)
    return 0


def run(console: Console, title: str, *arguments: object, threads: int = 1) -> None:
    """Run one of the project's modules, saying which. Raises CalledProcessError if it fails."""
    console.print(f"\n[bold]{title}[/bold]\n[dim]$ python -m {shlex.join(map(str, arguments))}[/dim]")
    # The demo is a CPU run everywhere: its two processes would need two GPUs.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True, env=environment)


def make_shards(console: Console) -> None:
    run(console, "1. Corpus", "data_tools.demo_corpus", "--output", CORPUS)
    text = f"{CORPUS}/train/*.jsonl.zst"
    if not TOKENIZER.exists():
        run(
            console,
            "2. Tokenizer",
            *("data_tools.train_tokenizer", "--input", text, "--vocab-size", 4096, "--output", TOKENIZER),
        )
    for split in ("train", "validation"):
        text = f"{CORPUS}/{split}/*.jsonl.zst"
        options = ("--input", text, "--tokenizer", TOKENIZER, "--output", SHARDS / split, "--workers", 2)
        run(console, f"3. Shard: {split}", "data_tools.tokenize", *options)


def train(console: Console) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run(console, "4. Training on two processes", *launcher, "-m", "pretrain.train", CONFIG, f"run_dir={RUN}")


def evaluate(console: Console) -> dict[str, Any]:
    """The content of perplexity.json, made unless it is newer than the run's end."""
    folder = RUN / "evaluation" / (RUN / "latest").read_text()
    result = folder / "perplexity.json"
    if not result.exists():
        contexts = ",".join(map(str, CONTEXTS))
        options = ("--data", SHARDS / "validation", "--contexts", contexts, "--max-tokens", EVALUATED_TOKENS)
        title, threads = "5. Perplexity against context", os.cpu_count() or 1
        run(console, title, "pretrain.evaluate", RUN, *options, threads=threads)
    return orjson.loads(result.read_bytes()) | {"folder": str(folder)}


def export_and_sample(console: Console) -> str:
    latest = HF / ".made_from"
    step = (RUN / "latest").read_text()
    if not latest.exists() or latest.read_text() != step:
        run(console, "6. Export to Hugging Face", "pretrain.convert", "to-hf", RUN, HF, "--overwrite")
        latest.write_text(step)
    console.print("\n[bold]7. A paragraph by AutoModelForCausalLM.generate[/bold]")
    command = [sys.executable, "-c", SAMPLE, str(HF), PROMPT]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def report(console: Console, evaluation: dict[str, Any], sample: str, seconds: float) -> None:
    rows = evaluation["sets"][0]["contexts"]
    n_tokens = rows[0]["tokens"]
    xz = xz_bits_per_byte(SHARDS / "validation", n_tokens)
    console.print(f"\n{sample}\n")
    console.print("[bold]Held-out text[/bold]")
    console.print("context   " + "".join(f"{row['context']:>9,}" for row in rows))
    console.print("perplexity" + "".join(f"{row['perplexity']:>9.2f}" for row in rows))
    console.print("ratio     " + "".join(f"{row['ratio']:>9.3f}" for row in rows))
    console.print("bits/byte " + "".join(f"{row['bits_per_byte']:>9.3f}" for row in rows))
    verdict = "below" if rows[0]["bits_per_byte"] < xz else "NOT below"
    console.print(
        f"\n{rows[0]['bits_per_byte']:.3f} bits per byte at the training context, {verdict} xz -9e's {xz:.3f} "
        f"on the same bytes"
    )
    places = {
        "corpus": CORPUS,
        "shards": SHARDS,
        "run (metrics.jsonl, checkpoints)": RUN,
        "perplexity (JSON, CSV, PNG)": evaluation["folder"],
        "Hugging Face model": HF,
    }
    for name, place in places.items():
        console.print(f"{name:34}{place}")
    console.print(f"{'waiting for data, of a step':34}{data_share():.2%}")
    console.print(f"{'time':34}{seconds:.0f} s")


def data_share() -> float:
    """Part of the training time that a process waited for its data, as measured between the progress lines."""
    records = [orjson.loads(line) for line in (RUN / "metrics.jsonl").read_bytes().splitlines()]
    shares = [record["data_share"] for record in records if "data_share" in record]
    return sum(shares) / len(shares)


def xz_bits_per_byte(prefix: Path, n_tokens: int) -> float:
    """What `xz -9e` needs for the text of the shard's tokens 1 … n_tokens, the ones that were scored."""
    paths = ShardPaths.of(prefix)
    tokenizer, manifest = Tokenizer.load(paths.tokenizer), Manifest.read(paths.manifest)
    tokens = np.fromfile(paths.bin, dtype=manifest.dtype, count=n_tokens + 1)[1:]
    ends = np.flatnonzero(tokens == tokenizer.eos_id) + 1
    text = "".join(tokenizer.decode(document.tolist()) for document in np.split(tokens, ends)).encode()
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


if __name__ == "__main__":
    sys.exit(main())

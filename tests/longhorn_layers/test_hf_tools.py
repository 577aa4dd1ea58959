"""Exports in transformers' tools: generate and its options, pipeline, Trainer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.cache_utils import DynamicCache

KINDS = ("diagonal", "gla")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
ModelMaker = Callable[..., PreTrainedModel]
CodeSaver = Callable[[PreTrainedModel, Path], Path]


def make_ids(batch: int, seqlen: int) -> Tensor:
    return torch.randint(67, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))


def generate(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    return model.generate(ids, attention_mask=options.pop("attention_mask", torch.ones_like(ids)), **options)


def cache_bytes(cache: DynamicCache) -> int:
    states = (state for layer in cache.layers for state in (layer.conv_states[0], layer.recurrent_states[0]))
    return sum(state.nbytes for state in states if state is not None)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and one of padding, which is the end, too."""
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([*ALPHABET, "</s>"])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="</s>", padding_side="left", model_max_length=10**6
    )


# ---- generate ----


@pytest.mark.parametrize("kind", KINDS)
def test_batched_generation_equals_single(
    kind: str, make_model: ModelMaker, left_padded: Callable[[list[Tensor]], tuple[Tensor, Tensor]]
) -> None:
    model = make_model(kind)
    rows = [make_ids(1, seqlen)[0] for seqlen in (1, 2, 13, 70)]
    ids, mask = left_padded(rows)
    together = generate(model, ids, attention_mask=mask, max_new_tokens=12)[:, ids.shape[1] :]
    alone = [generate(model, row[None], max_new_tokens=12)[0, len(row) :] for row in rows]
    assert together.tolist() == [row.tolist() for row in alone]
    assert len({tuple(row) for row in together.tolist()}) == len(rows)  # they differ by their prompts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 5, 16, 100])
def test_chunked_prefill_equals_the_whole(
    kind: str, size: int, make_model: ModelMaker, left_padded: Callable[[list[Tensor]], tuple[Tensor, Tensor]]
) -> None:
    model, lengths = make_model(kind), []
    ids, mask = left_padded([make_ids(1, 6)[0], make_ids(1, 33)[0]])
    whole = generate(model, ids, attention_mask=mask, max_new_tokens=8)
    model.model.embedding.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    chunked = generate(model, ids, attention_mask=mask, max_new_tokens=8, prefill_chunk_size=size)
    assert torch.equal(chunked, whole)
    assert lengths == [min(size, 33 - start) for start in range(0, 33, size)] + [1] * 7


def test_chunked_prefill_of_embeddings_and_without_a_cache(make_model: ModelMaker) -> None:
    model, ids = make_model(), make_ids(2, 11)
    embeds = model.get_input_embeddings()(ids).detach()
    whole = generate(model, ids, max_new_tokens=6)[:, 11:]
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=6), whole)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=6, prefill_chunk_size=4), whole)
    with pytest.raises(ValueError, match="prefill_chunk_size needs use_cache=True"):
        generate(model, ids, max_new_tokens=6, prefill_chunk_size=4, use_cache=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_goes_on_from_its_cache(kind: str, make_model: ModelMaker) -> None:
    model, ids = make_model(kind), make_ids(1, 20)
    whole = generate(model, ids, max_new_tokens=6)[0, 20:]
    with torch.no_grad():
        cache = model(ids[:, :14], use_cache=True).cache_params
    assert torch.equal(generate(model, ids[:, 14:], cache_params=cache, max_new_tokens=6)[0, 6:], whole)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_is_the_seeds(kind: str, make_model: ModelMaker) -> None:
    model, ids, texts = make_model(kind), make_ids(2, 5), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate(model, ids, max_new_tokens=20, do_sample=True, temperature=0.9, top_p=0.95))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("kind", KINDS)
def test_beams_find_a_likelier_text_and_need_no_cache_for_it(kind: str, make_model: ModelMaker) -> None:
    model, ids = make_model(kind), make_ids(2, 5)
    beams = generate(model, ids, max_new_tokens=12, num_beams=6)
    assert torch.equal(beams, generate(model, ids, max_new_tokens=12, num_beams=6, use_cache=False))

    @torch.no_grad()
    def log_likelihood(text: Tensor) -> float:
        scores = model(text).logits[:, 4:-1].log_softmax(-1)
        return scores.gather(-1, text[:, 5:, None]).sum().item()

    assert log_likelihood(beams) > log_likelihood(generate(model, ids, max_new_tokens=12)) + 0.1


@pytest.mark.parametrize(
    ("kind", "numbers"), [("diagonal", 3 * (48 * 3 + 48 * 5)), ("gla", 3 * 3 * 4 * 8)], ids=["longhorn", "gla"]
)
@torch.no_grad()
def test_the_cache_is_as_large_after_a_token_as_after_many(kind: str, numbers: int, make_model: ModelMaker) -> None:
    model = make_model(kind)
    outputs = model(make_ids(2, 1), use_cache=True)
    first = cache_bytes(outputs.cache_params)
    for _ in range(20):
        outputs = model(make_ids(2, 1), cache_params=outputs.cache_params, use_cache=True)
    outputs = model(make_ids(2, 500), cache_params=outputs.cache_params, use_cache=True)
    assert first == cache_bytes(outputs.cache_params) == 2 * 4 * numbers


# ---- pipeline and Trainer ----


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline(
    kind: str, make_model: ModelMaker, save_with_code: CodeSaver, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model(kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    folder = save_with_code(model, tmp_path / "export")
    tokenizer.save_pretrained(folder)
    prompts = ["The state of the Union", "Gentlemen", "I"]
    write = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    texts = write(prompts, batch_size=3, max_new_tokens=8, do_sample=False, return_full_text=False)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = generate(model, ids, max_new_tokens=8)[0, ids.shape[1] :]
        assert text[0]["generated_text"] == tokenizer.decode(alone, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_fine_tunes_with_gradient_checkpointing(
    kind: str, make_model: ModelMaker, save_with_code: CodeSaver, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = save_with_code(make_model(kind, vocab_size=len(tokenizer)), tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    sentence = "Fellow citizens of the Senate and of the House of Representatives"
    data = [{"input_ids": tokenizer(sentence[start : start + 24])["input_ids"]} for start in range(16)]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=24,
        save_steps=12,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=4,
        gradient_checkpointing=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collate)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < 0.6 * losses[0]
    prediction = trainer.predict(data)
    assert prediction.metrics["test_loss"] < 0.6 * before
    assert prediction.predictions.shape == (16, 24, len(tokenizer))  # logits alone, without a cache

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-24", trust_remote_code=True)
    ids = torch.tensor([data[0]["input_ids"]])
    assert torch.equal(saved(ids).logits, model.eval()(ids).logits)
    resumed = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    again = Trainer(resumed, arguments, train_dataset=data, data_collator=collate)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))
    torch.testing.assert_close(resumed.eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)

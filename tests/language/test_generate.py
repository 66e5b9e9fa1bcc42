"""Answers: batches write what single prompts write, beams find likelier texts, and options are chosen by likelihood."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from randlora_pl.errors import UserError
from randlora_pl.language.causal import CausalLMTask
from randlora_pl.language.encode import Encoded, collate, encode_prompt
from randlora_pl.language.generate import (
    Decoding,
    choose_options,
    learned_columns,
    token_losses,
    write_texts,
    write_tokens,
)

from .small import make

PROMPTS = ["repeat the first word: red", "old", "repeat the last word: red old tall wet mild answer:"]


@pytest.fixture(params=["qwen2", "llama", "phi3", "gpt2"])
def task(request: pytest.FixtureRequest, tokenizer: Path) -> CausalLMTask:
    """A decoder that says something: random, with large weights."""
    kind = request.param
    shape = {"tie_word_embeddings": False, "vocab_size": Tokenizer.from_file(str(tokenizer)).get_vocab_size()}
    task = make(tokenizer, kind, targets=["lm_head"] if kind == "gpt2" else None, overrides=shape)
    task.configure_model()
    task.eval()
    return task


def batch(task: CausalLMTask, prompts: list[str]) -> dict[str, torch.Tensor]:
    ids = [encode_prompt(task.vocabulary, prompt) for prompt in prompts]
    return collate([Encoded(each, each, len(each)) for each in ids], 0)


@pytest.mark.parametrize("how", [Decoding(1, 6), Decoding(3, 6), Decoding(2, 6, 0.8, 2)])
def test_a_batch_writes_what_each_prompt_writes_alone(how: Decoding, task: CausalLMTask) -> None:
    together = write_texts(task.model, task.vocabulary, batch(task, PROMPTS), how, 0)
    alone = [write_texts(task.model, task.vocabulary, batch(task, [prompt]), how, 0)[0] for prompt in PROMPTS]
    assert together == alone
    assert any(text.strip() for text in together)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:2]], ids=["three lengths", "one token"])
def test_prompts_that_are_read_once_give_what_transformers_gives(task: CausalLMTask, prompts: list[str]) -> None:
    texts = batch(task, prompts)
    seen: list[int] = []

    def note(module: Any, args: Any, options: dict[str, Any]) -> None:
        seen.append(options["input_ids"].numel() if "input_ids" in options else args[0].numel())

    found = {}
    for share in (True, False):
        seen.clear()
        with task.model.register_forward_pre_hook(note, with_kwargs=True):
            found[share] = (write_tokens(task.model, texts, Decoding(3, 5), 0, share=share), sum(seen))
    assert torch.equal(found[True][0], found[False][0])
    rows, length = texts["input_ids"].shape
    assert found[False][1] - found[True][1] == (3 - 1) * rows * (length - 1)


def test_greedy_writes_the_likeliest_tokens(task: CausalLMTask) -> None:
    """Against a plain loop without a cache."""
    (text,) = write_texts(task.model, task.vocabulary, batch(task, PROMPTS[:1]), Decoding(1, 5), 0)
    ids = encode_prompt(task.vocabulary, PROMPTS[0])
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 5 and (len(ids) == start or ids[-1] != task.vocabulary.eos_token_id):
            ids.append(int(task.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert text == task.vocabulary.decode(ids[start:], skip_special_tokens=True)


def test_the_likeliest_option_is_chosen(task: CausalLMTask) -> None:
    """Against the mean log-likelihood of each option alone."""
    options = [[[5, 6], [7], [8, 9, 10]], [[4], [12, 11]]]
    prompts = [encode_prompt(task.vocabulary, prompt) for prompt in PROMPTS[:2]]
    chosen = choose_options(task.model, prompts, options, 0, torch.device("cpu"))
    for prompt, some, found in zip(prompts, options, chosen, strict=True):
        scores = []
        for option in some:
            with torch.no_grad():
                logs = task.model(torch.tensor([[*prompt, *option]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(float(logs[range(len(option)), option].mean()))
        assert found == scores.index(max(scores))


def test_only_columns_with_labels_are_looked_at() -> None:
    labels = torch.tensor([[-100, -100, -100, 4, 5], [-100, -100, -100, -100, 7]])
    assert learned_columns(labels) == 2
    assert learned_columns(torch.full((2, 5), -100)) == 1
    assert learned_columns(torch.ones(2, 5, dtype=torch.int64)) == 4


def test_a_models_own_rules_of_generation_are_left_out(task: CausalLMTask) -> None:
    """Files of chat models say that they sample and punish repetitions; the search is the plain one."""
    model: Any = task.model
    asked, how = batch(task, PROMPTS), Decoding(1, 6)
    plain = write_texts(model, task.vocabulary, asked, how, 0)
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.top_k, own.min_new_tokens = 5.0, True, 50, 6
    assert write_texts(model, task.vocabulary, asked, how, 0) == plain
    assert model.generation_config is own


def test_what_stands_in_the_prompt_may_be_written(task: CausalLMTask) -> None:
    """The rule against repetitions looks at what is written alone, as in the released scripts of E2E."""
    size = len(task.vocabulary)
    pairs = [number for one in range(size) for other in range(size) for number in (one, other)]
    asked = collate([Encoded(pairs, pairs, len(pairs))], 0)
    (plain,) = write_texts(task.model, task.vocabulary, asked, Decoding(1, 2), 0)
    assert len(encode_prompt(task.vocabulary, plain)) == 2
    assert write_texts(task.model, task.vocabulary, asked, Decoding(1, 2, no_repeat_ngram=2), 0) == [plain]
    (ruled,) = write_texts(task.model, task.vocabulary, asked, Decoding(1, 12, no_repeat_ngram=1), 0)
    ids = encode_prompt(task.vocabulary, ruled)
    assert len(set(ids)) == len(ids)


def test_a_text_beyond_learned_positions_is_told(tokenizer: Path) -> None:
    task = make(tokenizer, "gpt2", targets=["lm_head"], overrides={"tie_word_embeddings": False, "n_positions": 20})
    task.configure_model()
    task.eval()
    encoded = [Encoded([3] * 15, [3] * 15, 15), Encoded([3], [3], 1)]
    asked = collate(encoded, 0, multiple=8)  # the padding to 16 needs no position
    assert len(write_texts(task.model, task.vocabulary, asked, Decoding(1, 5), 0)) == 2
    with pytest.raises(UserError, match=r"21 tokens \(6 of them new: --model.max_new_tokens\), and gpt2 has 20"):
        write_texts(task.model, task.vocabulary, asked, Decoding(1, 6), 0)
    with pytest.raises(UserError, match=r"21 tokens, and gpt2 has 20 positions: lower --data\.cutoff"):
        token_losses(task.model, collate([Encoded([3] * 21, [3] * 21, 21)], 0), 20)
    token_losses(task.model, collate([Encoded([3] * 20, [3] * 20, 20)], 0), 19)
    rotary = make(tokenizer, overrides={"max_position_embeddings": 20})
    rotary.configure_model()
    token_losses(rotary.model, collate([Encoded([3] * 30, [3] * 30, 30)], 0), 29)

"""Answers: batches write what single prompts write, beams find likelier texts, and options are chosen by likelihood."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation import configuration_utils

from randlora_pl.language import decoder as decoding
from randlora_pl.language.decoder import Decoding, choose_options, token_losses, write_texts, write_tokens
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tokenization import Encoded, collate, encode_prompt
from randlora_pl.utils.errors import UserError
from tests.language.small import SHAPES, make
from tests.support.products import covered, in_one_item

PROMPTS = ["repeat the first word: red", "old", "repeat the last word: red old tall wet mild answer:"]
KINDS = ["qwen2", "gpt2", *(pytest.param(name, marks=pytest.mark.full) for name in ("llama", "phi3"))]


@pytest.fixture(scope="module", params=KINDS)
def task(request: pytest.FixtureRequest, tokenizer: Path) -> CausalLMTask:
    """A decoder that says something: random, with large weights; not to be changed."""
    return decoder(request.param, tokenizer)


def decoder(kind: str, tokenizer: Path) -> CausalLMTask:
    """One of these that may be changed."""
    shape = {"tie_word_embeddings": False, "vocab_size": Tokenizer.from_file(str(tokenizer)).get_vocab_size()}
    task = make(tokenizer, kind, targets=["lm_head"] if kind == "gpt2" else None, overrides=shape)
    task.adapt()
    task.eval()
    return task


def batch(task: CausalLMTask, prompts: list[str]) -> dict[str, torch.Tensor]:
    ids = [encode_prompt(task.vocabulary, prompt) for prompt in prompts]
    return collate([Encoded(each, each, len(each)) for each in ids], 0)


@in_one_item("how", [Decoding(1, 6), Decoding(3, 6), Decoding(2, 6, 0.8, 2)])
def test_a_batch_writes_what_each_prompt_writes_alone(how: Decoding, task: CausalLMTask) -> None:
    together = write_texts(task.model, task.vocabulary, batch(task, PROMPTS), how, 0)
    alone = [write_texts(task.model, task.vocabulary, batch(task, [prompt]), how, 0)[0] for prompt in PROMPTS]
    assert together == alone
    assert any(text.strip() for text in together)


def test_greedy_answers_bring_no_remark_of_transformers(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty on lengths belongs to beams, and predict --beams 1 may follow a training with both."""
    said: list[str] = []
    monkeypatch.setattr(configuration_utils.logger, "warning_once", lambda text, *_: said.append(text))
    task = make(tokenizer)
    task.adapt()
    write_texts(task.model, task.vocabulary, batch(task, PROMPTS), Decoding(1, 2, 0.8), 0)
    assert not said


def reads(model: Any, texts: dict[str, torch.Tensor], how: Decoding, share: bool, eos: int | None = None) -> Any:
    """What is written, and how many tokens the model was given for it."""
    seen: list[int] = []

    def note(module: Any, args: Any, options: dict[str, Any]) -> None:
        seen.append(options["input_ids"].numel() if "input_ids" in options else args[0].numel())

    with model.register_forward_pre_hook(note, with_kwargs=True):
        if share:
            return write_tokens(model, texts, how, 0, eos), sum(seen)
        with mock.patch.object(decoding, "_prompt_cache", lambda *_, **__: {}):  # transformers reads it for each beam
            return write_tokens(model, texts, how, 0, eos), sum(seen)


@covered(
    ("how", "prompts"),
    [Decoding(3, 5), Decoding(4, 8, 0.5, 2), Decoding(2, 8, 3.0)],
    [PROMPTS, PROMPTS[1:2]],
    strength=1,
)
def test_prompts_that_are_read_once_give_what_transformers_gives(
    task: CausalLMTask, prompts: list[str], how: Decoding
) -> None:
    texts = batch(task, prompts)
    shared, few = reads(task.model, texts, how, True)
    plain, many = reads(task.model, texts, how, False)
    assert torch.equal(shared, plain)
    rows, length = texts["input_ids"].shape
    assert many - few == (how.num_beams - 1) * rows * (length - 1)
    end = int(plain[0, 1])  # beams that end early, at different places
    assert torch.equal(reads(task.model, texts, how, True, end)[0], reads(task.model, texts, how, False, end)[0])
    greedy = write_tokens(task.model, texts, Decoding(1, how.max_new_tokens, 1.0, how.no_repeat_ngram), 0)
    assert len(prompts) == 1 or not torch.equal(greedy, plain)  # the search is none of a single beam


def test_a_prompt_of_one_token_without_padding_is_written_after(task: CausalLMTask) -> None:
    ids = {"input_ids": torch.tensor([[5], [7]]), "attention_mask": torch.ones(2, 1, dtype=torch.int64)}
    shared, plain = (reads(task.model, ids, Decoding(3, 5), share) for share in (True, False))
    assert torch.equal(shared[0], plain[0]) and shared[1] == plain[1]


def small(kind: str, **shape: Any) -> Any:
    """A decoder of transformers with other layers than those of the paper, random, with large weights."""
    torch.manual_seed(0)
    values = {**SHAPES["qwen2"], "hidden_size": 32, "vocab_size": 60, "initializer_range": 0.3, **shape}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


LAYERS = {
    "window": ("mistral", {"sliding_window": 6}),
    "windows and whole": ("gemma2", {"sliding_window": 6, "head_dim": 8}),
    "angles that follow the length": (
        "llama",
        {"max_position_embeddings": 10, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "both in a layer": ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}),
    "states": ("mamba", {"state_size": 8}),
    "no cache": ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}


@pytest.mark.parametrize("layers", LAYERS)
def test_other_layers_write_what_they_write_in_transformers(layers: str) -> None:
    """Only keys and values can be repeated for beams; models of anything else read the prompts themselves."""
    kind, shape = LAYERS[layers]
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 60, (length,), generator=generator).tolist() for length in (13, 1, 7)]
    texts = collate([Encoded(ids, ids, len(ids)) for ids in rows], 0)
    shared, few = reads(small(kind, **shape), texts, Decoding(3, 8), True)
    plain, many = reads(small(kind, **shape), texts, Decoding(3, 8), False)  # some keep the angles of a long text
    assert torch.equal(shared, plain)
    assert (few < many) == layers.startswith("window")


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


def test_a_models_own_rules_of_generation_are_left_out(task: CausalLMTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of chat models say that they sample and punish repetitions; the search is the plain one."""
    model: Any = task.model
    asked, how = batch(task, PROMPTS), Decoding(1, 6)
    plain = write_texts(model, task.vocabulary, asked, how, 0)
    own = copy.deepcopy(model.generation_config)
    monkeypatch.setattr(model, "generation_config", own)
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
    def losses(model: Any, length: int, multiple: int = 8) -> None:
        token_losses(model, collate([Encoded([3] * length, [3] * length, length)], 0, multiple=multiple))

    task = make(tokenizer, "gpt2", targets=["lm_head"], overrides={"tie_word_embeddings": False, "n_positions": 20})
    task.adapt()
    task.eval()
    encoded = [Encoded([3] * 15, [3] * 15, 15), Encoded([3], [3], 1)]
    asked = collate(encoded, 0, multiple=8)  # the padding to 16 needs no position
    assert len(write_texts(task.model, task.vocabulary, asked, Decoding(1, 5), 0)) == 2
    with pytest.raises(UserError, match=r"--model.max_new_tokens"):
        write_texts(task.model, task.vocabulary, asked, Decoding(1, 6), 0)
    with pytest.raises(UserError, match=r"--data\.cutoff"):
        losses(task.model, 21)
    losses(task.model, 20)
    rotary = make(tokenizer, overrides={"max_position_embeddings": 20})
    rotary.adapt()
    losses(rotary.model, 30)
    for kind in ("codegen", "openai-gpt"):  # other tables of positions
        model = small(kind, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=20)
        with pytest.raises(UserError, match=f"21 tokens, and {kind} has 20 positions"):
            losses(model, 21)
        losses(model, 20, 4)


def test_options_that_are_empty_alike_or_long(task: CausalLMTask) -> None:
    """Those without tokens have no likelihood, the first of equal ones is chosen, and the mean over tokens counts."""
    device = torch.device("cpu")
    for prompts, options in (([[3]], [[[5], []]]), ([[]], [[[5], [6]]]), ([[3]], [[]])):
        with pytest.raises(UserError, match="no tokens"):
            choose_options(task.model, prompts, options, 0, device)
    assert choose_options(task.model, [], [], 0, device) == []
    assert choose_options(task.model, [[3, 4]], [[[5, 6], [5, 6]]], 0, device) == [0]
    (likely,) = write_tokens(task.model, batch(task, PROMPTS[:1]), Decoding(1, 40), 0).tolist()
    prompt = encode_prompt(task.vocabulary, PROMPTS[0])
    unlikely = int(task.model(torch.tensor([prompt])).logits[0, -1].argmin())
    assert choose_options(task.model, [prompt], [[[unlikely], likely]], 0, device) == [1]


def test_blocks_that_recompute_in_training_keep_keys_and_values_in_tests(task: CausalLMTask, tokenizer: Path) -> None:
    """Those that take themselves for training have no cache."""
    task = decoder(task.name, tokenizer)
    texts = batch(task, PROMPTS)
    before = reads(task.model, texts, Decoding(3, 5), True)
    task.gradient_checkpointing = True
    task.checkpoint_gradients(task.model)
    task.train()
    task.eval()
    after = reads(task.model, texts, Decoding(3, 5), True)
    assert torch.equal(before[0], after[0]) and before[1] == after[1]

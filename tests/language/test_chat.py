"""Conversations: what is read, what is refused by line, and which tokens a model learns of its own template."""

import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.language.chat import Conversation, Turn, has_conversations, read_conversations, turns_of
from randlora_pl.language.chat_template import ChatTemplate, encode_chats
from randlora_pl.language.data import TextData
from randlora_pl.language.tokenization import IGNORED, load_tokenizer
from randlora_pl.utils.errors import UserError
from tests.language.tokenizers import byte_tokenizer
from tests.support.products import in_one_item

ASKED = {"role": "user", "content": "2+2="}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


class Known(NamedTuple):
    """A template, and what a model writes behind an answer: within a conversation, and at its end."""

    template: str
    within: str
    last: str


def _chatml(more: str = "") -> str:
    turn = "{{ '<|im_start|>' + turn.role + '\n' + turn.content + eos_token + '\n' }}"
    return more + "{% for turn in messages %}" + turn + "{% endfor %}" + _asks("<|im_start|>assistant\n")


def _asks(words: str) -> str:
    return "{% if add_generation_prompt %}{{ '" + words + "' }}{% endif %}"


DEFAULT = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.' + eos_token + '\n' }}{% endif %}"
GEMMA = "{% for turn in messages %}{{ '<turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' }}"
GEMMA += "{{ turn.content | trim + '<turn|>\n' }}{% endfor %}" + _asks("<turn>model\n")
PHI = "{% for turn in messages %}{{ '[' + turn.role + ']' + turn.content + '[end]\n' }}{% endfor %}"
PHI += "{% if add_generation_prompt %}{{ '[assistant]' }}{% else %}{{ eos_token }}{% endif %}"
TEMPLATES = {
    "chatml": Known(_chatml(), "<end>", "<end>"),
    "default system": Known(_chatml(DEFAULT), "<end>", "<end>"),
    "start of text": Known("{{ bos_token }}" + _chatml(), "<end>", "<end>"),
    "no end of text": Known(GEMMA, "<turn|>\n", "<turn|>\n<end>"),
    "end of the whole": Known(PHI, "[end]\n", "[end]\n<end>"),
}
REWRITES = (
    "{% for turn in messages %}{{ turn.role + ':' }}{% if turn.role == 'assistant' and loop.last %}{{ 'hm, ' }}"
    "{% endif %}{{ turn.content + eos_token }}{% endfor %}" + _asks("assistant:")
)


@cache
def tokenizer_of(template: str) -> Any:
    tokenizer = byte_tokenizer(start=True)
    tokenizer.chat_template = template
    return tokenizer


def chat(*messages: dict[str, str]) -> Conversation:
    return Conversation(turns_of(messages, "here"), "here")


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=20)
FILLED = WORDS.map(str.strip).filter(bool)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    texts = draw(st.lists(st.tuples(FILLED, FILLED), min_size=1, max_size=4))
    turns = [Turn("system", draw(FILLED))] if draw(st.booleans()) else []
    for asked, answer in texts:
        turns += [Turn("user", asked), Turn("assistant", answer)]
    return Conversation(tuple(turns), "here")


def learned(tokenizer: Any, labels: Any) -> str:
    text: str = tokenizer.decode([label for label in labels if label != IGNORED])
    return text


@pytest.mark.parametrize("known", TEMPLATES.values(), ids=TEMPLATES)
@given(conversations())
def test_answers_and_their_ends_are_learned_in_the_template_of_the_model(known: Known, chat: Conversation) -> None:
    """Against the text: the template's own, of which an answer and what the model writes behind it count."""
    tokenizer = tokenizer_of(known.template)
    (found,) = encode_chats(tokenizer, [chat], 10_000)
    (every,) = encode_chats(tokenizer, [chat], 10_000, mask_prompt=False)
    answers = [turn.content for turn in chat.turns if turn.role == "assistant"]
    expected = "".join(f"{answer}{known.within}" for answer in answers[:-1]) + answers[-1] + known.last
    assert learned(tokenizer, found.labels) == expected
    text = tokenizer.apply_chat_template([turn._asdict() for turn in chat.turns], tokenize=False)
    assert tokenizer.decode(found.input_ids) in (text, text.removesuffix("\n"), text + "<end>")
    assert every.input_ids == every.labels == found.input_ids and found.full_length == len(found.labels)
    asked, answer = ChatTemplate(tokenizer).asked(chat)
    assert found.input_ids[: len(asked)] == asked and found.labels[len(asked) - 1] == IGNORED
    assert found.input_ids[len(asked) :] == found.labels[len(asked) :]
    assert answer == (answers[-1] + known.last.removesuffix("<end>")).strip()
    (cut,) = encode_chats(tokenizer, [chat], 7)
    assert cut.input_ids == found.input_ids[:7] and cut.labels == found.labels[:7]
    assert cut.full_length == found.full_length


def test_a_long_conversation_is_read_up_to_the_cutoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer renders and tokenizes the text before it: a thousand messages took minutes and gigabytes."""
    tokenizer = tokenizer_of(_chatml())
    template, rendered = tokenizer.apply_chat_template, []

    def counted(turns: Any, **how: Any) -> Any:
        rendered.append(len(turns))
        return template(turns, **how)

    long, (short,) = [ASKED, ANSWER] * 400, encode_chats(tokenizer, [chat(*[ASKED, ANSWER] * 9)], 200)
    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    (found,) = encode_chats(tokenizer, [chat(*long)], 200)
    assert found[:2] == short[:2]
    assert found.full_length == len(tokenizer(template(long, tokenize=False).rstrip("\n")).input_ids) - 1
    assert len(rendered) < 20 and max(rendered[1:]) < 20


@given(conversations())
def test_the_template_of_bytes_has_an_end_behind_each_turn(chat: Conversation) -> None:
    tokenizer = load_tokenizer("bytes")
    (found,) = encode_chats(tokenizer, [chat], 10_000)
    assert tokenizer.decode(found.input_ids) == "".join(f"{role}: {text}<|end|>" for role, text in chat.turns)
    expected = "".join(f"{text}<|end|>" for role, text in chat.turns if role == "assistant")
    assert learned(tokenizer, found.labels) == expected


@given(conversations())
def test_a_template_that_changes_earlier_answers_makes_a_sample_of_each(chat: Conversation) -> None:
    tokenizer = tokenizer_of(REWRITES)
    found = list(encode_chats(tokenizer, [chat], 10_000))
    places = [place for place, turn in enumerate(chat.turns) if turn.role == "assistant"]
    assert len(found) == len(places)
    for sample, place in zip(found, places, strict=True):
        shown = [turn._asdict() for turn in chat.turns[: place + 1]]
        assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(shown, tokenize=False)
        assert learned(tokenizer, sample.labels) == f"hm, {chat.turns[place].content}<end>"
    assert ChatTemplate(tokenizer).asked(chat)[1] == f"hm, {chat.turns[-1].content}"


def test_samples_of_changed_answers_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    two = chat(ASKED, ANSWER, ASKED, ANSWER)
    with caplog.at_level(logging.INFO, "randlora_pl"):
        assert len(list(encode_chats(tokenizer_of(REWRITES), [two, chat(ASKED, ANSWER), two]))) == 5
    (line,) = caplog.messages
    assert "each is a sample (2 conversations)" in line


def _merging(prepend: bool) -> Any:
    """A byte-level tokenizer that joins line breaks, or one that begins each text with a mark as Llama-2's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted([*pre_tokenizers.ByteLevel.alphabet(), "▁"])
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "ĊĊ", "▁4"])}
    merges = [("▁", "4")] if prepend else [("Ċ", "Ċ")]
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if prepend:
        plain.normalizer = normalizers.Prepend("▁")
    else:
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        plain.decoder = decoders.ByteLevel()
    template = "{% for turn in messages %}{{ turn.role + ':' + turn.content + eos_token }}{% endfor %}"
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
    made.chat_template = template.replace("':'", "':\n'") + _asks("assistant:" if prepend else "assistant:\n")
    if prepend:
        made.chat_template = template + _asks("assistant:")
    return made


def test_the_tokens_are_those_of_the_whole_text_if_the_question_has_them_too() -> None:
    """Tokenized apart, an answer would begin with the mark that stands before a text."""
    tokenizer = _merging(prepend=True)
    (found,) = encode_chats(tokenizer, [chat(ASKED, ANSWER)])
    whole = tokenizer.apply_chat_template([ASKED, ANSWER], tokenize=True, return_dict=True)["input_ids"]
    assert list(found.input_ids) == whole
    assert tokenizer.convert_ids_to_tokens([label for label in found.labels if label != IGNORED]) == ["4", "<end>"]


@in_one_item("answer", ["\nfour", "four"])
def test_no_token_is_half_question(answer: str) -> None:
    """Line breaks at both sides of the border would be one token, which a model that answers never sees."""
    tokenizer = _merging(prepend=False)
    (found,) = encode_chats(tokenizer, [chat(ASKED, {"role": "assistant", "content": answer})])
    asked = tokenizer(ChatTemplate(tokenizer).question((Turn("user", "2+2="),), "here"))["input_ids"]
    assert found.input_ids[: len(asked)] == asked
    assert learned(tokenizer, found.labels[len(asked) :]) == f"{answer}<end>"


# Files


def line(*messages: Any, **more: Any) -> str:
    return json.dumps({"messages": messages} | more)


def write(root: Path, *lines: str, split: str = "train") -> Path:
    root.mkdir(exist_ok=True)
    (root / f"{split}.jsonl").write_text("".join(f"{each}\n" for each in lines))
    return root


def test_files_of_the_splits_are_read_in_their_order(tmp_path: Path) -> None:
    write(tmp_path, line(ASKED, ANSWER), "", line(SYSTEM, ASKED, ANSWER | {"name": "x", "tool_calls": None}, id=3))
    found = read_conversations(tmp_path, "train")
    assert [[turn.role for turn in each.turns] for each in found] == [
        ["user", "assistant"],
        ["system", "user", "assistant"],
    ]
    assert found[1].where == f"{tmp_path / 'train.jsonl'}, line 3"
    assert read_conversations(tmp_path, "val") == read_conversations(tmp_path / "train.jsonl", "test") == []
    array = tmp_path / "chats.json"
    array.write_text(f"[{line(ASKED, ANSWER)},\n{line(ASKED, ANSWER, ASKED, ANSWER)}]")
    assert [len(each.turns) for each in read_conversations(array, "train")] == [2, 4]
    assert has_conversations(array) and has_conversations(tmp_path / "train.jsonl")
    for text in ("", "[]", "{", '{"prompt": "a"}', "3"):
        array.write_text(text)
        assert not has_conversations(array)
    assert not has_conversations(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert not has_conversations(tmp_path / "pipe.jsonl")  # without waiting for a writer


BROKEN = {
    "a cut line": ('{"messages": [', "no valid JSON"),
    "a list": ("[1]", "the record lacks 'messages'"),
    "a prompt": ('{"prompt": "a", "completion": "b"}', "For prompts and completions: --data.dataset jsonl"),
    "no list": ('{"messages": "a"}', "'messages' must be a list of messages"),
    "an empty list": (line(), "'messages' must be a list of messages"),
    "a text": (line("hello"), "message 1: expected an object with role and content"),
    "no role": (line({"content": "a"}), "message 1: 'role' is missing"),
    "no content": (line(ASKED, {"role": "assistant"}), "message 2: 'content' is missing"),
    "another role": (line(ASKED, ANSWER | {"role": "asistant"}), 'message 2: the role "asistant" is unknown. Did'),
    "a role of another program": (
        line({"role": "human", "content": "a"}),
        "role \"human\" is unknown. Did you mean 'user'?",
    ),
    "a misspelt key": (line({"role": "user", "contents": "a"}), "'content' is missing, there is 'role', 'contents'."),
    "no text as role": (line({"role": None, "content": "a"}), "message 1: the role null is unknown"),
    "a tool": (line(ASKED, {"role": "tool", "content": "4"}), "message 2: the role 'tool' is not supported"),
    "a call": (line(ASKED, ANSWER | {"tool_calls": [{"id": 1}]}), "message 2: 'tool_calls' is not read"),
    "a weight": (line(ASKED, ANSWER | {"weight": 0}), "message 2: 'weight' is not read"),
    "parts": (line({"role": "user", "content": [{"text": "a"}]}), "message 1: 'content' must be text, not [{"),
    "a blank": (line(ASKED, ANSWER | {"content": " \n"}), "message 2: the text of the assistant is empty"),
    "half a character": (line(ASKED | {"content": "\ud83d"}), "message 1: 'content' has half a character"),
    "a late system": (line(ASKED, SYSTEM, ANSWER), "message 2: after the user comes the assistant, not the system"),
    "two of the user": (line(ASKED, ASKED, ANSWER), "message 2: after the user comes the assistant, not the user"),
    "two answers": (line(ASKED, ANSWER, ANSWER), "message 3: after the assistant comes the user, not the assistant"),
    "an answer first": (line(ANSWER, ASKED), "message 1: a conversation begins with the system or the user"),
    "a system alone": (line(SYSTEM), "there is only a system message"),
    "no answer": (line(ASKED, ANSWER, ASKED), "the last message is the user's"),
}


@in_one_item("name", BROKEN)
def test_a_broken_conversation_is_reported_by_line_and_message(tmp_path: Path, name: str) -> None:
    text, message = BROKEN[name]
    file = write(tmp_path / name.replace(" ", "_"), line(ASKED, ANSWER), text) / "train.jsonl"
    with pytest.raises(UserError) as error:
        read_conversations(file.parent, "train")
    assert str(error.value).startswith(f"{file}, line 2") and message in str(error.value)
    assert str(error.value).count("\n") < 2


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl does not exist"):
        read_conversations(tmp_path, "test")
    with pytest.raises(UserError, match="has no conversations"):
        read_conversations(write(tmp_path, " "), "train")


@in_one_item(
    ("template", "text", "message"),
    [
        (None, "4", "The tokenizer has no chat template"),
        (_chatml(), "4<end>5", "here, message 2: the text has <end>, a control token"),
        ("{{ raise_exception('no system here') }}", "4", "here: the model's chat template refuses it: no system here"),
        ("{{ messages[0].content + 3 }}", "4", "here: the model's chat template refuses it"),
        ("{% if add_generation_prompt %}a{% else %}b{% endif %}", "4", "here: the model's chat template begins"),
    ],
)
def test_what_a_template_cannot_take_is_refused(template: str | None, text: str, message: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError) as error:
        list(encode_chats(tokenizer, [chat(ASKED, ANSWER | {"content": text})]))
    assert message in str(error.value) and str(error.value).count("\n") < 2


def test_a_tokenizer_without_an_end_of_text_is_refused() -> None:
    tokenizer = byte_tokenizer(end=False)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="no end of text"):
        ChatTemplate(tokenizer)


# The data module


class Given(TextData):
    """With the tokenizer of bytes, and without a task."""

    def setup(self, stage: str | None = None) -> None:
        self._tokenizer = load_tokenizer("bytes")
        super().setup(stage)


def test_conversations_become_batches_and_questions(tmp_path: Path) -> None:
    many = [line(ASKED | {"content": f"{number}+1="}, ANSWER | {"content": f"{number + 1}"}) for number in range(30)]
    root = write(write(tmp_path / "a", *many), line(SYSTEM, ASKED, ANSWER, ASKED, ANSWER), split="test")
    data = Given(dataset="chat", root=str(root), batch_size=4, steps=2)
    data.check_test()
    data.setup("fit")
    data.setup("test")
    facts = data.summary()
    assert (facts["train"], facts["val"], facts["test"], facts["mask_prompt"]) == (27, 3, 1, True)
    assert "completions are learned" in data.summary_lines(facts)["tokens"]
    sample = next(iter(data.train_dataloader()))
    for ids, labels in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
        asked, mark, _ = data._tokenizer.decode(ids).partition("+1=<|end|>assistant: ")
        assert mark and learned(data._tokenizer, labels) == f"{int(asked.removeprefix('user: ')) + 1}<|end|>"
    (batch,) = data.test_dataloader()
    text = data._tokenizer.decode(batch["input_ids"][0])
    assert text.endswith("user: 2+2=<|end|>assistant: 4<|end|>user: 2+2=<|end|>assistant: ")
    (item,) = data.items
    assert item.answer == "4" and item.find_answer(" 4\n") == "4"
    record = item.record("4")
    assert record["right"] and record["messages"][0] == SYSTEM and len(record["messages"]) == 4
    moved = Given(dataset="chat", root=str(root.rename(tmp_path / "b")), batch_size=4, steps=2)
    moved.setup("fit")
    assert moved.state_dict()["samples"] == data.state_dict()["samples"]


def test_what_the_template_refuses_of_a_question_is_reported_before_the_training(tmp_path: Path) -> None:
    root = write(write(tmp_path, line(ASKED, ANSWER), line(ASKED, ANSWER)), line(ASKED, ANSWER), split="test")
    write(root, line(ASKED, ANSWER), line(ASKED, ANSWER | {"content": "<|end|>"}), split="test")
    data = Given(dataset="chat", root=str(root), steps=1)
    data.check_test()
    with pytest.raises(UserError, match=r"test\.jsonl, line 2, message 2: the text has <\|end\|>"):
        data.setup("fit")

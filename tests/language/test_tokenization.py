import logging
import sys
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.language.tokenization import (
    IGNORED,
    Encoded,
    Sample,
    Side,
    collate,
    collate_sentences,
    encode,
    encode_prompt,
    encode_sentences,
    keep,
    pad_id,
)
from randlora_pl.utils.errors import UserError
from tests.language.tokenizers import byte_tokenizer, encode_one, sentence_tokenizer

tokenizer_of = cache(byte_tokenizer)
# Special tokens written out in a text would be read as such, and surrogates are no text.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=60)


@given(TEXT, TEXT, st.booleans(), st.booleans(), st.booleans())
def test_tokens_give_the_text_back_and_labels_the_part_that_is_learned(
    prompt: str, completion: str, mask: bool, separate: bool, start: bool
) -> None:
    tokenizer = tokenizer_of(start=start)
    found = encode_one(tokenizer, Sample(prompt, completion), 10_000, mask, separate)
    first, last = ("<start>" if start else ""), tokenizer.eos_token
    between = last if separate else ""
    assert tokenizer.decode(found.input_ids) == first + prompt + between + completion + last
    learned = [label for label in found.labels if label != IGNORED]
    assert tokenizer.decode(learned) == (completion + last if mask else first + prompt + between + completion + last)
    assert found.full_length == len(found.input_ids) == len(found.labels)
    assert found.labels[len(found.labels) - len(learned) :] == learned == found.input_ids[-len(learned) :]
    asked = encode_prompt(tokenizer, prompt)
    assert found.input_ids[: len(asked)] == asked
    assert encode_one(tokenizer, (prompt, completion), 10_000, mask, separate) == found


@given(TEXT, TEXT, st.integers(1, 40), st.booleans())
def test_a_cutoff_takes_the_end_and_tells_the_full_length(
    prompt: str, completion: str, cutoff: int, mask: bool
) -> None:
    whole = encode_one(tokenizer_of(), (prompt, completion), 10_000, mask)
    cut = encode_one(tokenizer_of(), (prompt, completion), cutoff, mask)
    assert cut == Encoded(whole.input_ids[:cutoff], whole.labels[:cutoff], whole.full_length)


def test_long_samples_are_counted_and_those_without_a_label_left_out(caplog: pytest.LogCaptureFixture) -> None:
    samples = [("a" * 3, "b"), ("a" * 9, "b"), ("a" * 3, "b" * 30), ("q" * 9, "")]
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        kept, lengths = keep(encode(tokenizer_of(), samples, 8, mask_prompt=True), 8)
    sizes = [encode_one(tokenizer_of(), sample).full_length for sample in samples]
    assert sizes[0] <= 8 < min(sizes[1:])
    assert (lengths.samples, lengths.cut, lengths.longest, lengths.dropped) == (4, 3, max(sizes), 2)
    assert [len(sample.input_ids) for sample in kept] == [sizes[0], 8]
    said = f"3 of 4 samples are longer than 8 tokens and are truncated (the longest has {max(sizes)})"
    assert caplog.messages == [f"{said}; 2 of them lost all learned tokens and are skipped"]
    kept, lengths = keep(encode(tokenizer_of(), samples, 8), 8)
    assert (len(kept), lengths.dropped) == (4, 0)
    caplog.clear()
    with caplog.at_level(logging.INFO, "randlora_pl"):
        _, lengths = keep(encode(tokenizer_of(), [("a", "b")], 8), 8)
    assert caplog.messages == [] and str(lengths) == "0 of 1 samples are longer than 8 tokens and are truncated"


def test_many_samples_take_few_calls_and_no_lists() -> None:
    """170,000 samples would take gigabytes as lists, and minutes with a call of the tokenizer for each."""
    plain = tokenizer_of()
    calls = []

    class Counting:
        eos_token_id, bos_token_id = plain.eos_token_id, plain.bos_token_id

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return plain(*args, **kwargs)

    samples = [("ab" * (number % 7), "c" * (number % 5)) for number in range(2345)] + [("a" * 1000, "b")]
    kept, lengths = keep(encode(Counting(), samples, 10_000, separate=True), 10_000)
    assert len(calls) == 1 + 2 * 3
    assert lengths.samples == len(kept) == len(samples)
    for sample, found in zip(samples, kept, strict=True):
        alone = encode_one(plain, sample, 10_000, separate=True)
        assert (list(found.input_ids), list(found.labels), found.full_length, ()) == alone
    assert sys.getsizeof(kept[-1].input_ids) < 4 * len(kept[-1].input_ids) + 100


def test_a_tokenizer_without_padding_pads_with_its_end_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert pad_id(tokenizer_of()) == 1
    assert caplog.messages == []
    tokenizer = byte_tokenizer(pad=False)
    with caplog.at_level(logging.INFO, "randlora_pl"):
        assert pad_id(tokenizer) == tokenizer.eos_token_id
    assert "no padding token" in caplog.messages[0]
    assert tokenizer.pad_token_id is None  # the user's tokenizer stays as it was
    batch = collate([encode_one(tokenizer, ("a", "b"))], pad_id(tokenizer))
    ends = batch["input_ids"] == tokenizer.eos_token_id
    assert ends.sum() == 8 - batch["attention_mask"].sum() + 1
    assert batch["labels"][ends].tolist() == [*[IGNORED] * (int(ends.sum()) - 1), tokenizer.eos_token_id]
    endless = byte_tokenizer(pad=False, end=False)
    with pytest.raises(UserError, match="neither"):
        pad_id(endless)
    with pytest.raises(UserError, match="no end of text"):
        encode_one(endless, ("a", "b"))


NUMBERS = st.lists(st.integers(0, 999), min_size=1, max_size=20)


@given(
    st.lists(NUMBERS, min_size=1, max_size=5), st.sampled_from(["left", "right"]), st.integers(1, 16), st.integers(0, 9)
)
def test_padding_is_outside_of_the_masks_and_changes_no_token(
    rows: list[list[int]], side: Side, multiple: int, pad: int
) -> None:
    encoded = [Encoded(row, [IGNORED, *row[1:]], len(row)) for row in rows]
    batch = collate(encoded, pad, side, multiple)
    longest = max(map(len, rows))
    length = batch["input_ids"].shape[1]
    assert length % multiple == 0
    assert longest <= length < longest + multiple
    for name in ("input_ids", "attention_mask", "labels"):
        assert batch[name].shape == (len(rows), length)
        assert batch[name].dtype == torch.int64
    for place, sample in enumerate(encoded):
        here = batch["attention_mask"][place] == 1
        assert batch["input_ids"][place][here].tolist() == sample.input_ids
        assert batch["labels"][place][here].tolist() == sample.labels
        assert (batch["input_ids"][place][~here] == pad).all()
        assert (batch["labels"][place][~here] == IGNORED).all()
        assert here[-1 if side == "left" else 0]


@pytest.mark.parametrize("sentences", [[("the task", "a pub"), ("price",)], [("the",), ("a task",)]])
def test_sentences_and_pairs_are_padded_as_the_tokenizer_pads_them(sentences: list[tuple[str, ...]]) -> None:
    tokenizer = sentence_tokenizer()
    encoded, lengths = encode_sentences(tokenizer, sentences)
    batch = collate_sentences(tokenizer, encoded, pad_id(tokenizer))
    expected = tokenizer.pad([dict(row) for row in encoded], pad_to_multiple_of=8, return_tensors="pt")
    assert set(batch) == set(expected) == {"input_ids", "token_type_ids", "attention_mask"}
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert lengths.cut == 0
    assert tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1]) == " ".join(
        f"{before} {text}" for before, text in zip(("[CLS]", "[SEP]"), sentences[0], strict=False)
    ) + (" [SEP]")


def test_long_pairs_are_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer: Any = sentence_tokenizer()
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        encoded, lengths = encode_sentences(tokenizer, [("a task", "the pub " * 20), ("a",)], 10)
    assert [len(row["input_ids"]) for row in encoded] == [10, 3]
    assert tokenizer.decode(encoded[0]["input_ids"]).startswith("[CLS] a task [SEP] the pub")
    assert (lengths.cut, lengths.longest) == (1, 45)
    assert "1 of 2 samples are longer than 10 tokens" in caplog.messages[0]

"""Samples that share a row: which rows, and that each has the losses and gradients that it has alone."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.adapters import trainable_parameters
from randlora_pl.language.batches import Tokens, pack
from randlora_pl.language.data import TextData
from randlora_pl.language.decoder import check_apart, token_losses
from randlora_pl.language.tokenization import IGNORED, Encoded, joined
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import assert_close
from tests.support.cli import Refused, Run
from tests.support.products import in_one_item, in_two_items, marked

from .small import make, records, typed
from .test_cli import SMALL
from .test_generate import LAYERS, small
from .test_token_losses import adapted, gradients


def sample(length: int, start: int = 3, masked: int = 0) -> Encoded:
    ids = [3 + (start + number) % 50 for number in range(length)]
    return Encoded(ids, [*[IGNORED] * masked, *ids[masked:]], length)


def starts(row: Encoded) -> list[int]:
    return [place for place, position in enumerate(row.positions) if position == 0]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 45))
def test_rows_have_every_sample_once_and_no_room_for_the_next(lengths: list[int], size: int) -> None:
    samples = [sample(length, 7 * number) for number, length in enumerate(lengths)]
    rows = pack(samples, size)
    found = []
    for row in rows:
        assert len(row.input_ids) == len(row.labels) == row.full_length <= size
        for start, end in pairwise([*starts(row), len(row.input_ids)]):
            assert row.labels[start] == IGNORED  # the last token of one sample does not predict the first of the next
            assert list(row.labels[start + 1 : end]) == list(row.input_ids[start + 1 : end])
            assert list(row.positions[start:end]) == list(range(end - start))
            found.append(list(row.input_ids[start:end]))
    assert sorted(found) == sorted(list(each.input_ids) for each in samples)
    first = [[*starts(row), len(row.input_ids)][1] for row in rows]
    for place, row in enumerate(rows):
        assert all(len(row.input_ids) + length > size for length in first[place + 1 :])
    assert pack(samples, size) == rows


def test_a_batch_counts_the_learned_tokens_of_each_row() -> None:
    rows = pack([sample(5, masked=2), sample(3), sample(9, masked=8), sample(1)], 9)
    held = Tokens(rows, 0)
    assert [held[place] for place in range(len(rows))] == [
        row._replace(**{name: list(getattr(row, name)) for name in ("input_ids", "labels", "positions")})
        for row in rows
    ]
    batch = held.batch([0, 1])
    assert batch["position_ids"].tolist() == [[*range(9), *[0] * 7], [*range(5), *range(3), 0, *[0] * 7]]
    assert held.counted.tolist() == [(each[1:] != IGNORED).sum() for each in batch["labels"]] == [1, 5]
    assert "position_ids" not in Tokens([sample(5), sample(3)], 0).batch([0, 1])


APART: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("llama", "qwen2", "phi3")},
    "qwen3": ("qwen3", {"head_dim": 8}),
    "learned positions": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "a table shorter than a row": ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 14}),
    "window": LAYERS["window"],
    "windows and whole": LAYERS["windows and whole"],
}
TOGETHER: dict[str, tuple[str, dict[str, Any]]] = {
    "states": LAYERS["states"],
    "convolutions": LAYERS["convolutions"],
    "both in a layer": LAYERS["both in a layer"],
    "reads ahead": ("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 32}),
    "distances": ("bloom", {}),
}


@in_two_items("name", marked(zip(APART), lambda row: row[0] not in ("qwen2", "phi3")))
def test_losses_and_gradients_are_those_of_the_samples_alone(name: str) -> None:
    kind, shape = APART[name]
    model = adapted(kind, **shape)
    check_apart(model)
    samples = [sample(13, 1, 4), sample(9, 30), sample(2, 11), sample(14, 40, 9), sample(1), sample(7, 21)]
    rows = [joined(samples[:3]), joined(samples[3:5]), samples[5]]
    losses, _, counted = token_losses(model, Tokens(rows, 0).batch(range(3)), 0.1)
    packed = [row[mine] for row, mine in zip(losses, counted, strict=True)]
    alone = []
    for each in samples:
        one, _, mine = token_losses(model, Tokens([each], 0).batch([0]), 0.1)
        alone.append(one[mine])
    assert_close(torch.cat(packed), torch.cat(alone), 1e-4)
    assert trainable_parameters(model)
    for one, other in zip(gradients(model, packed), gradients(model, alone), strict=True):
        assert_close(one, other, 1e-4)


@in_one_item("name", TOGETHER)
def test_models_that_see_the_sample_before_are_refused(name: str) -> None:
    kind, shape = TOGETHER[name]
    with pytest.raises(UserError, match=f"--data.packing: {kind} does not keep"):
        check_apart(small(kind, **{"pad_token_id": 0, "eos_token_id": 1, **shape}))


@in_one_item("kind", ["llama", "gpt2", "mamba"])
def test_the_check_sees_it_with_small_weights_and_in_half_precision(kind: str) -> None:
    """As weights begin that are not trained: a standard deviation of 0.02."""
    model = small(kind, pad_token_id=0, eos_token_id=1, n_embd=32, n_head=4, n_layer=2)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    for dtype in (torch.float32, torch.bfloat16):
        if kind != "mamba":
            check_apart(model.to(dtype))
            continue
        with pytest.raises(UserError):
            check_apart(model.to(dtype))


class Given(TextData):
    """The toy task, with its tokenizer and without a task."""

    vocabulary: ClassVar[Any] = None

    def setup(self, stage: str | None = None) -> None:
        self._tokenizer = self.vocabulary
        super().setup(stage)


@in_one_item("mask", [True, False])
def test_a_step_over_all_rows_has_the_loss_of_all_samples(tmp_path: Path, tokenizer: Path, mask: bool) -> None:
    task = make(tokenizer)
    task.adapt()
    Given.vocabulary = task.vocabulary
    lines = [json.dumps(row) for row in records()[:24]]
    file = tmp_path / "one.jsonl"
    file.write_text("\n".join(lines))
    options: dict[str, Any] = {"dataset": "jsonl", "root": str(file), "validation": 0, "mask_prompt": mask, "steps": 1}
    losses, facts, told = [], [], []
    rows = 24
    for packing in (False, True):
        data = Given(**options, packing=packing, cutoff=64, batch_size=rows)
        data.setup("fit")
        rows = len(data._held["train"])
        if packing:
            data = Given(**options, packing=True, cutoff=64, batch_size=rows)
            data.setup("fit")
        (batch,) = data.train_dataloader()
        losses.append((task.sample_losses(batch)[0] * task.loss_weights(batch)).sum())
        facts.append(data.summary())
        told.append(data.summary_lines(facts[-1]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert rows < 8 and facts[0]["train"] == facts[1]["train"] == 24 and facts[0]["tokens"] == facts[1]["tokens"]
    assert facts[1]["rows"] == rows and "rows" not in facts[0] and "packing" not in told[0]
    assert told[1]["packing"].startswith(f"24 samples are joined to {rows} rows, ")


def test_packing_through_the_command(run: Run, refused: Refused, toy: Path, tokenizer: Path) -> None:
    words = ("fit", *typed(tokenizer), "--data.dataset", "jsonl", "--data.root", str(toy), "--data.packing", "true")
    words = (*words, *SMALL, "--data.steps", "2", "--trainer.limit_val_batches", "0", "--data.batch_size", "4")
    assert "--model.loss_average samples needs samples that are not joined" in refused(
        *words, "--model.loss_average", "samples"
    )
    shown = run(*words, "--trainer.limit_test_batches", "1")
    assert shown.code == 0, shown.err
    assert "samples are joined to" in shown.out

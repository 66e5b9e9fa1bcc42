"""GPT-2 on E2E: what is learned and where it stands, what is written, and scores that belong to the whole corpus."""

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from randlora_pl.language.data import TextData
from randlora_pl.language.metrics import generation_scores
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.run.callbacks import WrittenAnswers
from randlora_pl.tasks import AdaptationModule, make_trainer
from randlora_pl.utils.errors import UserError

from .files import write_e2e
from .small import fit, make
from .tokenizers import byte_tokenizer


@pytest.fixture(autouse=True)
def no_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program reads its tables for many seconds; `test_generation` has it."""
    monkeypatch.setattr("randlora_pl.language.metrics.meteor", lambda *_: (None, "METEOR needs Java: install it"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_e2e(tmp_path / "data", more=3)


def gpt2(**options: Any) -> CausalLMTask:
    """A tiny GPT-2 of bytes."""
    overrides = {"vocab_size": 260, "tie_word_embeddings": False} | options.pop("overrides", {})
    return make("bytes", "gpt2", overrides=overrides, **({"max_new_tokens": 6} | options))


def e2e(root: Path, **options: Any) -> TextData:
    """The tiny files."""
    return TextData(**({"dataset": "e2e", "root": str(root), "cutoff": 512, "batch_size": 4, "steps": 2} | options))


def test_the_completion_alone_is_learned_after_an_end_of_text(root: Path) -> None:
    """Tokens of the meaning, end of text, tokens of a space and the reference, end of text: each encoded by itself."""
    task, data = gpt2(), e2e(root)
    fit(task, data, max_steps=1)
    encoded = data._held["train"][0]
    end, known = task.vocabulary.eos_token_id, task.vocabulary
    given = known("name : The Vaults | Type : pub | price : more than £ 30")["input_ids"]
    learned = known(" The Vaults pub has prices over £30 .")["input_ids"]
    assert encoded.input_ids == [*given, end, *learned, end]
    assert encoded.labels == [*[-100] * (len(given) + 1), *learned, end]
    assert data.summary() | {"train": 10, "val": 10, "mask_prompt": True, "cutoff": 512, "cut": 0} == data.summary()
    data.setup("test")
    assert [len(item.references) for item in data.items] == [2] * 5
    prompt = data._held["test"][0].input_ids
    assert prompt == [*given, end]


def test_scores_are_those_of_the_corpus(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five meanings in batches of two: neither means over batches, nor the padding of the last one counted."""
    said = ["The Vaults pub has prices over £30 .", "Aromi is a pub near Café Sicilia .", "Café 0 is near it .", ""]
    asked: list[str] = []

    def answers(self: CausalLMTask, batch: Any, items: list[Any]) -> list[str]:
        asked.extend(item.prompt for item, weight in zip(items, batch["weight"].tolist(), strict=True) if weight)
        return [f"\n {said[known.index(item.prompt) % 4]}\n\nand more " for item in items]

    data = e2e(root, eval_batch_size=2)
    monkeypatch.setattr(CausalLMTask, "write_answers", answers)
    from randlora_pl.language.prompt_sets import read_items

    groups = {item.prompt: list(item.references) for item in read_items("e2e", root, None)}
    known = list(groups)
    trainer = make_trainer(accelerator="cpu", default_root_dir=tmp_path / "run", callbacks=[WrittenAnswers()])
    (figures,) = trainer.test(AdaptationModule(gpt2()), data, verbose=False)
    assert sorted(asked) == sorted(known)  # each once
    texts = [said[number % 4] for number in range(5)]
    expected = generation_scores(texts, list(groups.values()))
    assert figures == pytest.approx({f"test/{name}": value for name, value in expected.items()}, rel=1e-5)
    assert figures.keys() == {"test/BLEU", "test/NIST", "test/ROUGE-L", "test/CIDEr"}
    lines = (tmp_path / "run" / "answers.jsonl").read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    assert [row["meaning"] for row in rows] == known and [row["written"] for row in rows] == texts
    assert rows[0] == {"test": "e2e", "meaning": known[0], "written": said[0], "references": groups[known[0]]}


@pytest.mark.parametrize("package", ["sacrebleu", "pycocoevalcap"])
def test_a_missing_scorer_is_told_before_anything_is_trained_or_written(
    root: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(CausalLMTask, "write_answers", lambda *_: pytest.fail("it wrote"))
    with pytest.raises(UserError, match=f"need {package} .*e2e"):
        e2e(root).check_test()
    with pytest.raises(UserError, match=f"need {package} .*e2e"):
        make_trainer(accelerator="cpu").test(AdaptationModule(gpt2()), e2e(root), verbose=False)


def test_epsilon_of_adamw_is_what_was_typed_also_after_a_checkpoint(root: Path, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "one.ckpt")

    trainer = fit(gpt2(adam_eps=1e-3), e2e(root, steps=1), callbacks=[Save()])
    assert {group["eps"] for group in trainer.optimizers[0].param_groups} == {1e-3}
    again = fit(gpt2(adam_eps=1e-6), e2e(root, steps=2), tmp_path / "one.ckpt")
    assert {group["eps"] for group in again.optimizers[0].param_groups} == {1e-6}
    usual = fit(gpt2(), e2e(root, steps=1))
    assert {group["eps"] for group in usual.optimizers[0].param_groups} == {1e-8}


def test_texts_that_are_longer_than_the_model_are_refused(root: Path) -> None:
    """An embedding of positions would fail with an index error."""
    with pytest.raises(UserError, match="gpt2"):
        fit(gpt2(overrides={"n_positions": 64}), e2e(root))
    with pytest.raises(UserError, match="40"):
        task = gpt2(overrides={"n_positions": 64}, max_new_tokens=40)
        make_trainer(accelerator="cpu").test(AdaptationModule(task), e2e(root), verbose=False)
    data = e2e(root, cutoff=80)
    fit(gpt2(overrides={"n_positions": 80}), data)  # cut samples fit
    assert data.lengths["train"].cut > 0


def test_padding_without_a_token_for_it_is_said_once(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    byte_tokenizer(pad=False).save_pretrained(tmp_path / "tokenizer")
    task = make(tmp_path / "tokenizer", "gpt2", overrides={"vocab_size": 400}, max_new_tokens=2)
    with caplog.at_level("INFO", "randlora_pl"):
        data = e2e(root, eval_batch_size=2)
        fit(task, data, limit_val_batches=None)
        make_trainer(accelerator="cpu").test(AdaptationModule(task), data, verbose=False)
    assert [m for m in caplog.messages if "no padding token" in m] == [
        "The tokenizer has no padding token: padding with its end of text '<end>', masked"
    ]
    assert data.pad == task.vocabulary.eos_token_id


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tests": ["boolq"]}, r"e2e has one, test\.txt"), ({"root": "nowhere"}, r"nowhere does not exist.*\n.*e2e")],
)
def test_mistakes(options: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(UserError, match=message):
        fit(gpt2(), e2e(**({"root": root} | options)))

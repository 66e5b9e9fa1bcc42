"""Decoders train, and what an optimizer step learns does not depend on how it is cut up."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from randlora_pl.adapters import RandLoRA
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tokenization import collate, encode, pad_id
from randlora_pl.tasks import AdaptationModule, make_trainer
from randlora_pl.utils.errors import UserError
from tests.language.files import record, write_commonsense
from tests.language.small import WORDS, fit, make, texts, trained


def moved(task: CausalLMTask, other: CausalLMTask, start: CausalLMTask) -> tuple[float, float]:
    """How far training moved, and how far two trainings are apart."""
    ends, others, begins = (torch.cat([v.flatten() for v in trained(t).values()]) for t in (task, other, start))
    return float((ends - begins).norm()), float((ends - others).norm())


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of 3 to 13 tokens."""
    folder = tmp_path_factory.mktemp("uneven")
    rows = [{"prompt": " ".join(WORDS[: 1 + n % 7]), "completion": " old" * (1 + n % 5)} for n in range(41)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("average", ["tokens", pytest.param("samples", marks=pytest.mark.full)])
def test_accumulated_training_equals_undivided_training(average: Any, uneven: Path, tokenizer: Path) -> None:
    """12 samples a step of different lengths, and a shorter last step: 4 micro-batches of 3 against one of 12."""
    options = {"mask_prompt": False, "steps": None, "epochs": 1, "validation": 0}
    whole, split, start = (make(tokenizer, loss_average=average) for _ in range(3))
    fit(whole, texts(uneven, batch_size=12, **options))
    fit(split, texts(uneven, batch_size=3, **options), accumulate_grad_batches=4)
    fit(start, texts(uneven, batch_size=12, **options), max_steps=0)
    far, apart = moved(whole, split, start)
    assert apart < 2e-3 * far


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(toy: Path, tokenizer: Path) -> None:
    """Against plain cross-entropy over all learned tokens of two micro-batches, and over samples of each."""
    rows = [{"prompt": "red", "completion": " old tall wet mild loud"}, {"prompt": "dry blue", "completion": " new"}]
    folder = tokenizer.parent / "uneven"
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    losses: dict[str, list[Tensor]] = {}

    class Keep(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
            losses.setdefault(pl_module.objective.loss_average, []).append(loss.detach())

    fresh = make(tokenizer)
    fresh.adapt()
    each = []
    for row in rows:
        prompt = fresh.vocabulary(row["prompt"])["input_ids"]
        learned = [*fresh.vocabulary(row["completion"])["input_ids"], fresh.vocabulary.eos_token_id]
        with torch.no_grad():
            logits = fresh.model(torch.tensor([[*prompt, *learned]])).logits[0, len(prompt) - 1 : -1]
        each.append(torch.nn.functional.cross_entropy(logits, torch.tensor(learned), reduction="none"))
    expected = {"tokens": torch.cat(each).mean(), "samples": torch.stack([loss.mean() for loss in each]).mean()}
    for average in expected:
        task = make(tokenizer, loss_average=average)  # type: ignore[arg-type]
        data = texts(folder, batch_size=1, steps=1, validation=0)
        fit(task, data, accumulate_grad_batches=2, callbacks=[Keep()], max_steps=1)
    assert expected["tokens"] != pytest.approx(float(expected["samples"]), rel=1e-3)
    for average, wanted in expected.items():  # Lightning divides each by the number of micro-batches
        assert float(sum(losses[average])) == pytest.approx(float(wanted), rel=1e-5)


def test_validation_has_no_label_smoothing(toy: Path, tokenizer: Path) -> None:
    from randlora_pl.language.batches import Tokens
    from tests.language.tokenizers import encode_one

    task = make(tokenizer, label_smoothing=0.5)
    task.adapt()
    batch = Tokens([encode_one(task.vocabulary, ("red old", " tall"))], 0).batch([0])
    smooth = float(task.train().sample_losses(batch)[0].detach())
    plain = float(task.eval().sample_losses(batch)[0].detach())
    task.label_smoothing = 0.0
    assert plain == pytest.approx(float(task.train().sample_losses(batch)[0].detach())) != pytest.approx(smooth)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.full), 3])
def test_resumed_run_ends_with_the_same_bits(step: int, toy: Path, tokenizer: Path, tmp_path: Path) -> None:
    class SaveAt(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == step and not (tmp_path / "middle.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    adapter = RandLoRA(rank=8, dropout=0.2)
    whole, resumed = make(tokenizer, adapter=adapter), make(tokenizer, adapter=adapter)
    fit(whole, texts(toy, steps=5), callbacks=[SaveAt()], accumulate_grad_batches=2)
    torch.manual_seed(123)  # another process has another state
    trainer = fit(resumed, texts(toy, steps=5), tmp_path / "middle.ckpt", accumulate_grad_batches=2)
    assert trainer.global_step == 5
    assert all(torch.equal(value, trained(resumed)[name]) for name, value in trained(whole).items())


def test_recomputed_activations_give_the_same_weights(toy: Path, tokenizer: Path) -> None:
    """Blocks must take themselves for training to recompute; frozen embeddings must not cut the gradient."""
    plain, again = make(tokenizer), make(tokenizer, gradient_checkpointing=True)
    fit(plain, texts(toy, steps=1))
    fit(again, texts(toy, steps=1))
    calls: list[int] = []
    block: Any = again.model.model.layers[0]  # type: ignore[union-attr]
    inner = block._gradient_checkpointing_func
    block._gradient_checkpointing_func = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    again.train()
    ids = torch.ones(1, 4, dtype=torch.int64)
    again.model(input_ids=ids, attention_mask=ids, use_cache=False).logits.sum().backward()
    assert calls and not any(m.training for m in block.self_attn.modules() if type(m) is torch.nn.Linear)
    for name, value in trained(plain).items():
        torch.testing.assert_close(trained(again)[name], value, rtol=1e-4, atol=1e-6)
    again.eval()
    assert not block.training


@pytest.mark.parametrize("schedule", ["linear", pytest.param("cosine", marks=pytest.mark.full)])
def test_rate_falls_to_its_end_after_the_warm_up(schedule: Any, toy: Path, tokenizer: Path) -> None:
    rates: list[float] = []

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    task = make(tokenizer, schedule=schedule, warmup_steps=2, learning_rate=0.3)
    fit(task, texts(toy, steps=6), callbacks=[Keep()])
    middle = {"linear": [0.3, 0.225, 0.15, 0.075], "cosine": [0.3, 0.256066, 0.15, 0.043934]}
    assert rates == pytest.approx([0.1, 0.2, *middle[schedule]], rel=1e-4)


def test_wrong_missing_and_empty_answers_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question with options needs one of them in its answer, another question any text."""
    write_commonsense(tmp_path)
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([record("boolq", 0)] * 4))  # true is right
    (tmp_path / "test.jsonl").write_text(4 * '{"prompt": "2+2=", "completion": " 4"}\n')
    (tmp_path / "train.jsonl").write_text('{"prompt": "2+2=", "completion": " 4"}\n')
    task = make("bytes")
    for dataset, test, written, right, unfound in (
        ("commonsense_15k", "boolq", ["true, not false", "false", "I do not know", ""], 1, 2),
        ("jsonl", "test", [" 4 ", "5", "4 5", ""], 1, 1),
    ):
        monkeypatch.setattr(task, "write_answers", lambda batch, _, told=written: [told[n] for n in batch["index"]])
        tests = [test] if dataset != "jsonl" else None
        (found,) = make_trainer(accelerator="cpu").test(
            AdaptationModule(task), texts(tmp_path, dataset=dataset, tests=tests)
        )
        assert (found["test/acc"], found["test/unfound"]) == (right / 4, unfound / 4)


def test_a_vocabulary_that_is_too_small_is_told(tokenizer: Path) -> None:
    with pytest.raises(UserError, match="qwen2"):
        make(tokenizer, overrides={"vocab_size": 5}).adapt()


def test_an_encoder_is_refused() -> None:
    """RoBERTa as a decoder sees the tokens that it is to learn."""
    task = CausalLMTask(name="roberta", pretrained="random", config_overrides={"num_hidden_layers": 1})
    with pytest.raises(UserError, match="TextClassificationTask"):
        task.build()


def test_a_tokenizer_that_nobody_typed_is_missed_by_the_name_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for option, typed in (
        ("name", {}),
        ("pretrained", {"pretrained": "no/such"}),
        ("tokenizer", {"tokenizer": "no/a"}),
    ):
        with pytest.raises(UserError, match=rf"cannot be loaded \(--model\.{option}\)"):
            _ = CausalLMTask(name="no/name", **typed).vocabulary


def test_a_loader_of_ones_own_trains(tokenizer: Path) -> None:
    task = make(tokenizer, loss_average="samples")
    encoded = encode(task.vocabulary, [("red old", "tall")] * 4, 32)
    batch = collate(list(encoded), pad_id(task.vocabulary))
    batch |= {"weight": torch.full((4,), 0.25), "index": torch.arange(4)}
    trainer = make_trainer(max_steps=2, accelerator="cpu")
    trainer.fit(AdaptationModule(task), train_dataloaders=torch.utils.data.DataLoader([batch, batch], batch_size=None))
    assert trainer.global_step == 2

"""Encoders that classify: grades over whole sets, heads and their files, and mistakes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertForMaskedLM

from randlora_pl.adapters import LinearProbe, RandLoRA, VeRA, inject
from randlora_pl.interop import AdaptedModel
from randlora_pl.language.tasks.classification import TextClassificationTask
from randlora_pl.language.tasks.common import load_language_task
from randlora_pl.language.text_files import read_own
from randlora_pl.language.tokenization import model_config, split
from randlora_pl.run.callbacks.summary import model_results
from randlora_pl.run.options.shipped import find_config
from randlora_pl.tasks import AdaptationModule, make_trainer
from randlora_pl.utils.errors import UserError
from tests.language.classify import SHAPE, labelled, make, write_reviews, write_scores
from tests.language.small import trained


def trainer(**options: Any) -> Any:
    return make_trainer(**({"accelerator": "cpu", "limit_val_batches": 0} | options))


def test_the_toy_task_is_learned_and_graded_whole(tmp_path: Path) -> None:
    """41 test texts in batches of 6, the last one of 5: the grades of scikit-learn on all predictions."""
    write_reviews(tmp_path)
    task, data = make(), labelled(tmp_path, steps=80, eval_batch_size=6)
    logged = trainer()
    logged.fit(AdaptationModule(task), data)
    assert "train/acc" in logged.logged_metrics
    (found,) = trainer().test(AdaptationModule(task), data, verbose=False)
    rows = read_own(tmp_path / "test.csv")
    labels = [["negative", "positive"].index(row.label) for row in rows]
    predicted = task.classify([row.texts for row in rows], batch_size=7).argmax(1).tolist()
    assert found["test/acc"] == pytest.approx(accuracy_score(labels, predicted)) == found["test/score"]
    assert found["test/matthews"] == pytest.approx(matthews_corrcoef(labels, predicted), abs=1e-6)
    assert found["test/acc"] > 0.9
    shares = task.classify([row.texts for row in rows])
    loss = -shares[range(len(labels)), labels].log().mean()
    assert found["test/loss"] == pytest.approx(float(loss), rel=1e-4)


def test_scores_are_learned_by_their_squared_error_and_graded_whole(tmp_path: Path) -> None:
    """Correlations of ragged batches are no mean of theirs."""
    write_scores(tmp_path)
    task = make(learning_rate=3e-3)
    data = labelled(tmp_path, dataset="jsonl", scores=True, steps=12, eval_batch_size=2)
    logged = trainer(enable_checkpointing=False)
    logged.fit(AdaptationModule(task), data)
    (found,) = trainer().test(AdaptationModule(task), data, verbose=False)
    rows = read_own(tmp_path / "test.jsonl")
    labels, predicted = [float(row.label) for row in rows], task.classify([row.texts for row in rows])[:, 0].tolist()
    assert found["test/pearson"] == pytest.approx(pearsonr(predicted, labels)[0], abs=1e-5) == found["test/score"]
    assert found["test/spearman"] == pytest.approx(spearmanr(predicted, labels)[0], abs=1e-5)
    assert found["test/combined"] == pytest.approx((found["test/pearson"] + found["test/spearman"]) / 2)
    error = sum((a - b) ** 2 for a, b in zip(predicted, labels, strict=True)) / len(labels)
    assert found["test/loss"] == pytest.approx(error, rel=1e-4)
    assert "train/loss" in logged.logged_metrics and "train/acc" not in logged.logged_metrics, "no score is right"


@pytest.mark.parametrize("kind", [pytest.param("roberta", marks=pytest.mark.full), "bert", "distilbert", "deberta-v2"])
def test_encoders_of_other_families(kind: str, tmp_path: Path) -> None:
    """The encoder is frozen, in eval mode and without the head; adapter and head train, also on pairs."""
    shape: dict[str, Any] = SHAPE
    if kind == "distilbert":
        shape = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 300}
    if kind == "deberta-v2":
        shape = SHAPE | {"pooler_hidden_size": 32}
    task = make(kind, config_overrides=shape, head_dropout=0.5)
    data = labelled(write_scores(tmp_path), dataset="jsonl", scores=True, batch_size=4, steps=1)
    fitted = trainer(max_steps=0)
    fitted.fit(AdaptationModule(task), data)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.train()
    training = [m for m in task.backbone.modules() if isinstance(m, torch.nn.Dropout) and m.training]  # type: ignore[union-attr]
    assert not training
    dropouts = [m for m in task.completed(task.model).modules() if isinstance(m, torch.nn.Dropout) and m.training]
    assert dropouts and {m.p for m in dropouts} == {0.5}
    trainer().fit(AdaptationModule(task), labelled(tmp_path, dataset="jsonl", scores=True, batch_size=4, steps=2))
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    own = task.trained_state().keys()
    assert changed <= own and any(name.startswith("head.") for name in changed)
    assert any(name.startswith("backbone.") for name in changed)
    assert len(task.report.rows) == 2 * (5 if kind == "bert" else 6)  # q, k, v and the MLP; and but for BERT o, too
    assert not any("classifier" in row.layer or "pooler" in row.layer for row in task.report.rows)


def built(**options: Any) -> TextClassificationTask:
    task = make(**options)
    task.set_classes(["no", "yes"])
    task.adapt()
    return task


def test_the_head_follows_the_seed_and_weights_from_a_folder_follow_the_folder(tmp_path: Path) -> None:
    AutoModel.from_config(AutoConfig.for_model("roberta", **SHAPE)).save_pretrained(tmp_path / "base")
    one, same, other = (
        built(name=str(tmp_path / "base"), pretrained=None, config_overrides=None, tokenizer="bytes", seed=seed)
        for seed in (0, 0, 1)
    )
    assert one.report.base_hash == other.report.base_hash  # the head is no part of the base model
    name = "classifier.dense.weight"
    assert torch.equal(one.head_tensors()[name], same.head_tensors()[name])
    assert not torch.equal(one.head_tensors()[name], other.head_tensors()[name])
    assert one.head_tensors()[name].std().item() == pytest.approx(SHAPE["initializer_range"], rel=0.1)
    assert not one.head_tensors()["classifier.dense.bias"].any()


def test_a_head_in_the_folder_is_taken_where_it_fits(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bert", **SHAPE, num_labels=2)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    options: dict[str, Any] = {
        "name": str(tmp_path),
        "pretrained": None,
        "config_overrides": None,
        "tokenizer": "bytes",
    }
    assert torch.equal(built(**options).head_tensors()["classifier.weight"], model.classifier.weight)
    three = make(**options)
    three.set_classes(["a", "b", "c"])
    three.adapt()
    assert three.head_tensors()["classifier.weight"].shape == (3, 32)


def test_mistakes_are_told(tmp_path: Path) -> None:
    BertForMaskedLM(AutoConfig.for_model("bert", **SHAPE)).save_pretrained(tmp_path / "no_pooler")
    options: dict[str, Any] = {"pretrained": None, "config_overrides": None, "tokenizer": "bytes"}
    with pytest.raises(UserError, match=r"bert.pooler.dense.bias"):
        built(name=str(tmp_path / "no_pooler"), **options)
    with pytest.raises(UserError, match="classification"):
        built(name="vit", config_overrides=None)
    with pytest.raises(UserError, match="258"):
        built(overrides={"vocab_size": 100})
    with pytest.raises(UserError, match="warmup_fraction"):
        make(warmup_fraction=1.0)
    task = make()
    with pytest.raises(UserError, match="classes"):
        task.adapt()
    with pytest.raises(UserError, match=r"data module, or set_classes\(classnames\) first"):
        task.take_data("fit")
    with pytest.raises(UserError, match="'a'"):
        task.set_classes(["a"])
    with pytest.raises(UserError, match=r"'yes'\]"):
        built().set_classes([])
    write_reviews(tmp_path)
    short = make(overrides={"max_position_embeddings": 268})
    with pytest.raises(UserError, match="10"):
        trainer().fit(AdaptationModule(short), labelled(tmp_path))


def test_the_adapter_folder_brings_task_head_and_classes_back(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    task = make()
    trainer().fit(AdaptationModule(task), labelled(tmp_path))
    task.save(tmp_path / "adapter")
    back = load_language_task(tmp_path / "adapter")
    texts = ["a great film", "a poor song, they say"]
    task.eval()
    torch.testing.assert_close(back.classify(texts), task.classify(texts), rtol=1e-4, atol=1e-6)
    assert back.classnames == ["negative", "positive"] and back.targets == ["qkv", "o", "fc1", "fc2"]
    named: Any = AdaptedModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(named.classify(texts), back.classify(texts))


def test_the_warm_up_is_a_share_of_the_steps(tmp_path: Path) -> None:
    task = make(warmup_fraction=0.3)
    fitted = trainer()
    fitted.fit(AdaptationModule(task), labelled(write_reviews(tmp_path), steps=7))
    assert task.warmup_steps == math.ceil(0.3 * 7) == 3
    factor = fitted.lr_scheduler_configs[0].scheduler.lr_lambdas[0]
    assert [factor(step) for step in (0, 1, 2, 3, 7)] == pytest.approx([0.25, 0.5, 0.75, 1, 0])


def test_the_head_has_a_rate_of_its_own(tmp_path: Path) -> None:
    """By default it is the adapter's; the rate reaches the optimizer, the schedule, the file and the results."""
    assert make(learning_rate=0.02).head_learning_rate == 0.02
    task = make(learning_rate=0.02, head_learning_rate=0.5)
    fitted = trainer()
    fitted.fit(AdaptationModule(task), labelled(write_reviews(tmp_path), steps=2))
    rates = {id(p): group["initial_lr"] for group in fitted.optimizers[0].param_groups for p in group["params"]}
    assert {rates[id(each)] for each in task.head.parameters()} == {0.5}
    assert {rates[id(p)] for p in task.model.parameters() if p.requires_grad} == {0.02}
    again = load_language_task(task.save(tmp_path / "adapter"))
    assert isinstance(again, TextClassificationTask) and again.head_learning_rate == 0.5
    assert model_results(task)["head_learning_rate"] == 0.5
    with pytest.raises(UserError, match="head_learning_rate is 0"):
        make(head_learning_rate=0.0)


def test_rates_and_a_head_alone(tmp_path: Path) -> None:
    assert make(learning_rate=None).learning_rate == 1e-4
    assert make(learning_rate=None, adapter=VeRA()).learning_rate == 1e-2
    task = make(adapter=LinearProbe())
    trainer().fit(AdaptationModule(task), labelled(write_reviews(tmp_path)))
    assert task.report.trainable == 0
    assert {name.partition(".")[0] for name in trained(task)} == {"head"}


@pytest.mark.parametrize("name", ["glue_roberta_base", pytest.param("glue_roberta_large", marks=pytest.mark.full)])
def test_configs_train_as_many_parameters_as_they_say(name: str) -> None:
    """Models of the true sizes on the meta device: the adapter's, and the head's beside them."""
    text = find_config(name).read_text()
    options: dict[str, Any] = yaml.safe_load(text)["model"]["init_args"]
    with torch.device("meta"):
        encoder, head = split(
            AutoModelForSequenceClassification.from_config(model_config(options["name"], "random", None))
        )
    adapter = RandLoRA(**options["adapter"]["init_args"])
    report = inject(encoder, adapter, options["targets"])
    assert f"{report.trainable:,} trained parameters of the adapter" in text
    assert f"{sum(p.numel() for p in head.parameters()):,} of the head" in text
    bases = -(-min(report.rows[0].shape) // adapter.rank)  # type: ignore[operator]
    assert adapter.alpha == pytest.approx(2 * adapter.rank / math.sqrt(bases), rel=1e-3)  # type: ignore[operator]

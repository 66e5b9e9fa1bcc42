import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml

from randlora_pl.data.unlabelled import batches, framed
from randlora_pl.language.data import TokenData
from randlora_pl.run import stages
from randlora_pl.run.callbacks import StartSummary
from randlora_pl.tasks import AdaptationModule, load_task
from tests.support.cli import SMALL, Refused, Run

KEYS = (
    "test/acc test/balanced_accuracy test/macro_f1 zeroshot/acc val/acc trainable_parameters total_parameters "
    "fit_seconds peak_memory_bytes "
    "images_per_second version version/torch seed basis_fingerprint steps effective_batch learning_rate"
)


BEST = [
    *("--checkpoint.test", "best", "--checkpoint.monitor", "val/loss", "--checkpoint.mode", "max"),
    *("--trainer.val_check_interval", "1", "--trainer.check_val_every_n_epoch", "null"),
]


def only_run(root: Path, name: str = "quickstart") -> Path:
    (folder,) = (root / "runs" / name).glob("2*")
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


def test_run_folder_holds_everything(finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert {
        *("config.yaml", "results.json", "run.log", "shots.json", "checkpoints/last.ckpt"),
        *("adapter/adapter.safetensors", "adapter/adapter_config.json", "adapter-best/adapter.safetensors"),
        *("figures/confusion.png", "figures/confusion.csv", "figures/predictions.png", "figures/mistakes.png"),
        "test_per_class.csv",
    } <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert not any("part" in name or name.startswith(".") for name in names)
    told = (finished / "run.log").read_text()
    assert "zero-shot" in told and ".lock" not in told  # which the run still holds then


def test_results_are_flat_and_complete(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert set(KEYS.split()) <= set(results)
    assert not any(isinstance(value, dict) for value in results.values())
    assert 0 <= results["test/acc"] <= 1 and 0 <= results["zeroshot/acc"] <= 1
    assert results["steps"] == 3 and results["finished"]
    assert results["trainable_parameters"] == results["adapter_parameters"] < results["total_parameters"]
    assert results["config"] == ["quickstart.yaml"]


def test_tensorboard_has_scalars_and_images(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 9}).Reload()
    scalars = {tag for tag in board.Tags()["scalars"] if not tag.startswith("hp")}
    assert {"zeroshot/acc", "test/acc", "test/macro_f1", "val/acc"} <= scalars
    assert {"test/confusion", "test/predictions", "test/mistakes"} <= set(board.Tags()["images"])
    assert [board.Scalars(name)[-1].step for name in ("zeroshot/acc", "val/acc", "test/acc")] == [0, 3, 3]


def test_resolved_config_repeats_the_run(run: Run, finished: Path, tmp_path: Path) -> None:
    resolved = yaml.safe_load((finished / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["learning_rate"] == 1e-3
    assert run("fit", "--config", str(finished / "config.yaml"), "--run.root", "runs").code == 0
    assert weights(only_run(tmp_path)) == weights(finished)


def test_end_page_names_figures_and_next_commands_for_the_adapter_that_was_tested(run: Run, tmp_path: Path) -> None:
    """The first validation is the best where the highest loss is."""
    out = run("fit", *SMALL, *BEST).out
    folder = only_run(tmp_path)
    place = folder.relative_to(tmp_path)
    assert "results.json" in out and ".lock" not in out
    for text in ("zero-shot: accuracy", "adapted layer", "optimizer steps", "peak memory", "test  ", "train/loss"):
        assert text in out
    for command in (f"predict --adapter {place}/adapter-best", f"test --run {place}", f"tensorboard --logdir {place}"):
        assert command in out
    out = out.replace("\n", " ")
    assert re.search(r"test +accuracy [\d.]+ %, .*loss [\d.]+ +\(adapter-best, step [12]\)", out), out
    assert "/adapter-best --images PATH" in out and "/adapter --images PATH" not in out


@pytest.mark.slow
def test_the_last_adapter_is_tested_where_none_is_known_to_be_the_best(run: Run, tmp_path: Path) -> None:
    none = ["--checkpoint.test", "best", "--data.steps", "2", "--trainer.limit_val_batches", "0"]
    shown = run("fit", *SMALL, *none, "--run.name", "none")
    assert shown.code == 0
    assert "No validation ran, so the best adapter is unknown and the last one was tested." in shown.out
    assert "/adapter --images PATH" in shown.out.replace("\n", " ") and "(adapter-best" not in shown.out


def test_a_best_adapter_of_another_run_is_not_looked_for(run: Run, finished: Path, tmp_path: Path) -> None:
    """The checkpoint knows of a best figure, but its adapter is in the run that it is from."""
    start = ["--ckpt_path", str(finished / "checkpoints/last.ckpt"), "--checkpoint.test", "best"]
    shown = run("fit", *SMALL, *start, "--run.name", "on")
    assert shown.code == 0, shown.err
    folder = only_run(tmp_path, "on")
    results = json.loads((folder / "results.json").read_text())
    assert results["tested"] == "adapter" and "best/step" not in results and "adapter-best" not in shown.out
    assert results["test/acc"] == json.loads((finished / "results.json").read_text())["test/acc"]


@pytest.mark.slow
def test_results_say_which_adapter_was_tested_last(run: Run, tmp_path: Path) -> None:
    """A run that went on with another choice is not called a test of the best."""
    assert run("fit", *SMALL, *BEST, "--run.name", "twice").code == 0
    file = only_run(tmp_path, "twice") / "results.json"
    results = json.loads(file.read_text())
    assert results["tested"] == "adapter-best" and results["best/step"] < 3
    file.write_text(json.dumps(results | {"finished": False}))
    shown = run("fit", "--resume", str(file.parent), "--checkpoint.test", "last")
    assert shown.code == 0, shown.err
    again = json.loads(file.read_text())
    assert again["tested"] == "adapter" and again["test/loss"] != results["test/loss"]
    assert "(adapter-best, step" not in shown.out


def test_test_and_validate_of_a_run_give_its_figures(run: Run, finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    result = run("test", "--run", str(finished), "--run.root", "runs")
    assert f"accuracy {100 * results['test/acc']:.2f} %" in result.out
    tested = json.loads((only_run(tmp_path, "quickstart-test") / "results.json").read_text())
    assert tested["test/acc"] == results["test/acc"]
    result = run("validate", "--run", str(finished), "--run.root", "runs")
    assert f"accuracy {100 * results['val/acc']:.2f} %" in result.out


def test_run_without_evaluation(run: Run, refused: Refused, finished: Path, tmp_path: Path) -> None:
    none = ("--trainer.limit_test_batches", "0", "--trainer.limit_val_batches", "0", "--trainer.max_steps", "2")
    result = run("fit", *SMALL, *none, "--run.logger", "none")
    assert result.code == 0, result.err
    assert "2 optimizer steps, 16 images drawn" in result.out and "tensorboard" not in result.out
    folder = only_run(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    assert results["finished"] and not any("/acc" in key for key in results)
    assert (results["data/steps"], results["data/draws"]) == (2, 16)
    for verb, option in (("test", "test"), ("validate", "val")):
        option = f"--trainer.limit_{option}_batches"
        assert f"evaluated nothing: {option} is 0" in refused(verb, "--run", str(finished), option, "0")
        assert "--ckpt_path" in refused(verb, *SMALL, "--ckpt_path", "some.ckpt")


def test_data_without_validation_images(
    run: Run, refused: Refused, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    monkeypatch.setattr("randlora_pl.data.ImageData.val_dataloader", lambda self: [])
    result = run("fit", *SMALL, "--trainer.val_check_interval", "1")
    assert result.code == 0, result.err
    assert "has no" in refused("validate", "--run", str(finished))


def test_unknown_figure_to_monitor(run: Run, tmp_path: Path) -> None:
    own = ("--trainer.callbacks", "ModelSummary")  # with one, only the validation shows what is logged
    result = run("fit", *SMALL, "--checkpoint.monitor", "val/accuracy", *own)
    message = result.err
    assert result.code == 2 and only_run(tmp_path).is_dir(), "what was trained is not lost"
    assert "checkpoint.monitor" in message and "'val/acc'" in message


def test_untrained_model_is_tested_without_an_adapter(run: Run, finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    out = run("test", *(word for word in SMALL)).out
    assert "pretrained model" in out and f"accuracy {100 * results['zeroshot/acc']:.2f} %" in out


def test_adapter_of_another_kind_is_refused_with_both_values(refused: Refused, finished: Path) -> None:
    adapter = str(finished / "adapter")
    assert "--model.adapter.rank" in refused("test", "--adapter", adapter, "--model.adapter.rank", "7")
    assert "--model" in refused("test", "--adapter", adapter, "--model", "TextHeadTask")
    assert "adapter folder" in refused("test", "--adapter", str(finished / "figures"))


def test_adapter_of_other_base_weights_is_refused(run: Run, finished: Path, tmp_path: Path) -> None:
    result = run("test", "--adapter", str(finished / "adapter"), "--seed_everything", "1", "--run.root", "runs")
    assert result.code == 2 and len(result.err.splitlines()) <= 2
    assert not (tmp_path / "runs").exists()


def test_adapter_of_images_with_another_mean_is_refused(run: Run, finished: Path, tmp_path: Path) -> None:
    task = load_task(finished / "adapter")
    assert task.saved is not None
    task.save(tmp_path / "other", {"frame": task.saved.metadata["training"]["frame"] | {"mean": (0.5, 0.4, 0.3)}})
    result = run("test", "--adapter", "other")
    assert result.code == 2 and "with mean (0.5, 0.4, 0.3), and the model has" in result.err


def test_loss_that_is_not_finite_ends_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = AdaptationModule.training_step

    def step(self: AdaptationModule, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = plain(self, batch, batch_idx)
        return loss * math.nan if batch_idx == 2 else loss

    monkeypatch.setattr(AdaptationModule, "training_step", step)
    result = run("fit", *SMALL)
    assert result.code == 2
    assert "--model.learning_rate" in result.err
    folder = only_run(tmp_path)
    assert str(folder.relative_to(tmp_path) / "adapter") in result.err and "(step 2)" in result.err
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["metadata"]["training"]["step"] == 2


def test_memory_that_runs_out_is_told_with_what_to_try(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: AdaptationModule, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(AdaptationModule, "training_step", step)
    result = run("fit", *SMALL)
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert "--trainer.accumulate_grad_batches" in result.err
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(AdaptationModule, "test_step", step)
    assert "--data.eval_batch_size 16" in run("fit", *SMALL).err, "it is the test that needs less"


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


def test_a_dry_run_prints_the_start_page_and_writes_nothing(
    run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path / "cache"))
    result = run("fit", *SMALL, "--dry-run", "--run.logger", "[csv,tensorboard]")
    assert result.code == 0 and not list(tmp_path.iterdir()), result.err
    for row in (r"trainable +\d[\d,]+ of ", "steps +3 optimizer steps", "memory +[0-9.]+ MB of weights"):
        assert re.search(row, result.out), row
    assert "cannot resume" in refused("fit", "--dry_run", "--resume", "runs/quickstart/TIME")
    assert "--dry-run takes no value, not --dry-run=1" in refused("fit", "--dry-run=1", "--config", "quickstart")
    (tmp_path / "config.yaml").touch()  # of the user; a dry run has no folder to go on with
    with monkeypatch.context() as patched:
        patched.setattr("randlora_pl.run.callbacks.summary.facts", interrupted)
        result = run("fit", *SMALL, "--dry-run")
    assert result.code == 130 and "resume" not in result.err and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "config.yaml").unlink()
    assert "Unknown option --dry-run" in refused("validate", "--dry-run", "--data.shots", "3")


def test_other_errors_keep_their_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: StartSummary, *args: Any) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(StartSummary, "on_fit_start", broken)
    with pytest.raises(ZeroDivisionError):
        run("fit", *SMALL)


def test_settings_that_lightning_refuses_are_told_in_a_line(refused: Refused) -> None:
    assert "`val_check_interval` (99)" in refused("fit", *SMALL, "--trainer.val_check_interval", "99")


@pytest.mark.slow
def test_outputs_that_are_not_finite_are_no_figures(
    run: Run, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, spoilt = AdaptationModule._evaluate, ["zeroshot", "val"]

    def spoiling(module: AdaptationModule, batch: dict[str, torch.Tensor], stage: str, name: str) -> object:
        image = batch["image"] * (math.nan if name in spoilt else 1)
        return evaluate(module, batch | {"image": image}, stage, name)

    monkeypatch.setattr(AdaptationModule, "_evaluate", spoiling)
    assert "pretrained model are not finite" in refused("fit", *SMALL)
    spoilt[:] = ["test"]
    assert "pretrained model are not finite" in refused("test", *SMALL)
    page = run("fit", *SMALL, "--trainer.limit_val_batches", "0")
    assert page.code == 0 and "loss not finite" in page.out


def test_checkpoint_to_start_from(run: Run, refused: Refused, finished: Path, tmp_path: Path) -> None:
    small = [*SMALL, "--data.shots", "2"]
    assert "checkpoint" in refused("fit", *small, "--ckpt_path", "nowhere")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((finished / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    assert "is cut off" in refused("fit", *small, "--ckpt_path", str(cut))
    other = run("fit", *small, "--ckpt_path", str(finished / "checkpoints" / "last.ckpt"), "--model.adapter.rank", "7")
    assert other.code == 2 and "7" in other.err and "6" in other.err


def test_checkpoint_holds_only_what_trains(finished: Path) -> None:
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert all("delta" in name for name in checkpoint["state_dict"])


PROMPTED = ["--model", "PromptTask", "--model.prompts.words", "a photo of a"]
BY_SGD = [*PROMPTED, "--model.optimizer", "sgd", "--model.learning_rate", "1e-3"]
UNTRAINABLE = [
    ([*BY_SGD, "--model.schedule", "epochs"], "the schedule of epochs needs --data.epochs"),
    (["--trainer.callbacks", "randlora_pl.run.callbacks.GaussianAverage"], "GaussianAverage is over epochs"),
    ([*PROMPTED, "--model.adapter", "AdaLoRA", "--model.classifier_steps", "0.4"], "AdaLoRA's procedure"),
    ([*BY_SGD, "--model.adapter", "GaLore"], "has an optimizer of its own"),
]


@pytest.mark.parametrize(("words", "message"), UNTRAINABLE, ids=["schedule", "average", "procedure", "optimizer"])
def test_what_cannot_train_is_refused_before_the_zero_shot_test(run: Run, words: list[str], message: str) -> None:
    page = run("fit", *SMALL, *words)
    assert page.code == 2 and message in page.err
    assert "zero-shot" not in page.out + page.err and not list(Path("runs").rglob("results.json"))


def figures_of(run: Run, tmp_path: Path, name: str, *words: str) -> dict[str, Any]:
    """Results of a test of the adapter of a run."""
    adapter = only_run(tmp_path, name) / "adapter"
    result = run(
        "test", "--adapter", str(adapter), "--run.name", "other", *words, "--trainer.limit_test_batches", "1.0"
    )
    assert result.code == 0, result.err
    return dict(json.loads((only_run(tmp_path, "other-test") / "results.json").read_text()))


def test_a_text_head_names_the_new_classes(run: Run, tmp_path: Path) -> None:
    words = ["--model", "TextHeadTask", "--data.classes", "base", "--run.name", "base"]
    assert run("fit", *SMALL, *words).code == 0
    folder = only_run(tmp_path, "base")
    results = json.loads((folder / "results.json").read_text())
    assert (results["data/classes"], results["data/class_half"], results["data/train"]) == (5, "base", 10)
    assert "zeroshot/acc" in results and results["trainable_parameters"] == results["adapter_parameters"]
    names = (folder / "test_per_class.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in names[1:]] == ["zero", "one", "two", "three", "four"]
    metadata = json.loads((folder / "adapter/adapter_config.json").read_text())["metadata"]
    assert metadata["classnames"][-1] == "four" and metadata["training"]["class_half"] == "base"
    new = figures_of(run, tmp_path, "base", "--data.classes", "new")
    assert (new["data/classes"], new["data/class_half"], new["data/test"]) == (5, "new", 180)
    assert 0 <= new["test/acc"] <= 1


def test_a_trained_head_has_the_rows_of_some_of_its_classes(run: Run, tmp_path: Path) -> None:
    words = ["--model", "LinearHeadTask", "--run.name", "whole", "--trainer.limit_test_batches", "0"]
    assert run("fit", *SMALL, *words).code == 0
    results = json.loads((only_run(tmp_path, "whole") / "results.json").read_text())
    assert "zeroshot/acc" not in results
    assert results["trainable_parameters"] == results["adapter_parameters"] + 10 * 128, "those of the head"
    new = figures_of(run, tmp_path, "whole", "--data.classes", "new")
    task = load_task(only_run(tmp_path, "whole") / "adapter")
    data = framed({"dataset": "digits", "classes": "new", "num_workers": 0}, task.image_spec, 90)
    data.setup("test")
    with torch.inference_mode():
        right = [
            (task.eval().class_logits(images)[:, 5:].argmax(1) == labels).sum()
            for images, labels in batches(data, data.samples("test"), 90)
        ]
    assert new["test/acc"] == pytest.approx(float(sum(right)) / 180)  # type: ignore[arg-type]
    short = ["--data.steps", "1", "--trainer.limit_val_batches", "0", "--trainer.limit_test_batches", "0"]
    assert run("fit", *SMALL, *words[:2], *short, "--data.classes", "base", "--run.name", "half").code == 0
    refused = run("test", "--adapter", str(only_run(tmp_path, "half") / "adapter"), "--data.classes", "new")
    assert refused.code == 2 and "has a head for 5 classes, which are not" in refused.err


def test_a_stage_without_texts_names_the_options_that_provide_them(tmp_path: Path) -> None:
    data = MagicMock(spec=TokenData, dataset="csv", root=tmp_path / "own.csv")
    app: Any = SimpleNamespace(datamodule=data, command=SimpleNamespace(folders={"run": Path("runs/own")}))
    assert stages._samples_for_it(app, "test") == (
        f" Add {tmp_path / 'own.csv' / 'test.csv'}, or use the validation samples: randlora-pl validate --run runs/own"
    )
    data.root.touch()
    assert f"and give --data.root {tmp_path}, or hold out" in stages._samples_for_it(app, "val")

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from randlora_pl.adapters import LoRA, RandLoRA, inject
from randlora_pl.models import ImageTower, library_of, meta_clip, meta_vit
from randlora_pl.run.lightning_cli import App, RunParser, _whole_numbers_first
from randlora_pl.run.options.shipped import config_names
from randlora_pl.run.session import prepare
from randlora_pl.run.stages import write_config
from randlora_pl.tasks import TextHeadTask, VisionLanguageTask
from randlora_pl.utils.errors import UserError
from tests.support.products import marked

BASES = [name for name in config_names() if "/" not in name]
FRAGMENTS = [name for name in config_names() if "/" in name and not name.startswith("sweeps/")]
COUNTS = {
    "clip_vitb16": 5_170_320,
    "clip_vitb32": 5_170_320,
    "clip_vitl14": 12_192_768,
    "clip_vith14": 23_519_664,
    "clip_vision_vitb32": 3_566_592,
    "clip_vision_vitl14": 9_510_912,
    "dinov2_vitb14": 3_566_592,
    "siglip2_vitb16": 7_529_472,
    "pe_core_vitb16": 16_644_240,
    "metaclip2_vith14": 23_519_664,
    "mobileclip2_s2": 2_156_704,
    "dinov3_vits16": 898_560,
    "dinov3_vitb16": 3_566_592,
}

BUILT = {"clip_vitb32", "clip_vision_vitb32", "commonsense_phi3", "commonsense_llama3", "dinov2_vitb14"}
BUILT |= {"glue_roberta_base", "quickstart", "tiny_clip", "dinov3_vits16", "mobileclip2_s2"}
LIKE = {"clip_vitl14", "clip_vith14", "clip_vision_vitl14", "glue_roberta_large", "dinov3_vitb16", "metaclip2_vith14"}
LIKE |= {"pe_core_vitb16"}
"""Configs that other tests build, and those that differ from one that is built in the model alone."""

Build = Callable[..., App]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """The app of a command, with its run folder in an empty place."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> App:
        monkeypatch.delenv("RANDLORA_PL_RUN_FOLDER", raising=False)
        return App(prepare("fit", ["--trainer.accelerator", "cpu", *words]))

    return call


@pytest.mark.parametrize(("name",), marked(zip(BASES), lambda row: row[0] not in BUILT | LIKE))
def test_every_config_builds(build: Build, name: str) -> None:
    own = ["--data.root", "."] if name.startswith(("qwen3", "smollm2")) else []
    app = build("--config", name, *own)
    assert app.folder.is_dir()
    batches = {"commonsense": 16, "glue": 64, "e2e": 8, "qwen3": 16, "smollm2": 8}
    global_batch = batches.get(name.partition("_")[0], 128)
    found = app.trainer.accumulate_grad_batches * app.datamodule.batch_size
    assert found == global_batch or name in ("quickstart", "tiny_clip")


def test_the_quickstart_draws_a_third_of_the_images_of_ten_epochs(build: Build) -> None:
    app = build("--config", "quickstart")
    data: Any = app.datamodule
    data.setup("fit")
    assert data.plan.samples_drawn <= 4_800  # a second on two cores for 300
    assert vars(app.task.adapter) == vars(build("--config", "tiny_clip").task.adapter)


@pytest.mark.parametrize(("name",), marked(zip(FRAGMENTS), lambda row: FRAGMENTS.index(row[0]) % 6 == 0))
def test_every_fragment_builds_on_a_config(build: Build, name: str) -> None:
    kind, _, short = name.rpartition("/")
    recipe = "commonsense_qwen2" if short.startswith(("commonsense", "llama3")) else "clip_vitb32"
    app = build("--config", recipe if kind == "recipes" else "quickstart", "--config", name)
    names = {"full": "fullfinetuning", "linear_probe": "linearprobe", "clip_lora": "lora", "lora_plus": "lora"}
    expected = {"recipes": "randlora", "prompts": "frozen"}.get(kind, names.get(short, short))
    assert app.task.adapter.method().lower() == expected


def test_one_line_trains_prompts_and_randlora_by_adamw(build: Build) -> None:
    few = ("--data.shots", "2", "--data.steps", "2", "--data.batch_size", "4", "--trainer.limit_val_batches", "0")
    few += ("--model.pretrained", "random")
    app = build("--config", "tiny_clip", "--model", "PromptTask", "--model.prompts", "CoOp", *few)
    app.trainer.fit(app.model, app.datamodule)
    (optimizer,) = app.trainer.optimizers
    sizes = [sum(each.numel() for each in group["params"]) for group in optimizer.param_groups]
    assert isinstance(optimizer, torch.optim.AdamW) and sum(sizes) == 55_704 + 512
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1e-3, 2e-3}
    papers = ("--config", "tiny_clip", "--config", "coop", "--config", "randlora")
    with pytest.raises(UserError, match=r"add --model.optimizer adamw --model.schedule cosine, or give a"):
        build(*papers)
    assert build(*papers, "--model.optimizer", "adamw", "--model.schedule", "cosine").task.adapter.rank == 6
    assert build(*papers, "--model.learning_rate", "0.1").task.optimizer == "sgd"


@pytest.mark.parametrize(
    ("name", "count"),
    marked(COUNTS.items(), lambda row: row[0].endswith(("b32", "v3_vits16", "mobileclip2_s2"))),
)
def test_every_model_is_counted_on_the_meta_device(build: Build, name: str, count: int) -> None:
    task = build("--config", name).task
    model = meta_clip(task.name) if library_of(task.name) == "open_clip" else meta_vit(task.name, task.img_size)
    if isinstance(task, TextHeadTask):
        model = ImageTower(model)
    assert inject(model, task.adapter, task.targets).trainable == count
    if name == "clip_vitb32":
        task = build("--config", name, "--config", "official").task
        assert isinstance(task, VisionLanguageTask) and task.logit_scale == "raw"
        assert inject(meta_clip(task.name), task.adapter, task.targets).trainable == 5_198_184, "one basis more"


@pytest.mark.parametrize(("recipe", "epochs", "frozen"), [("paper", 3, "bfloat16"), ("official", 1, "float32")])
def test_recipes_of_commonsense_differ_in_epochs(build: Build, recipe: str, epochs: int, frozen: str) -> None:
    app = build("--config", "commonsense_phi3", "--config", f"recipes/commonsense_{recipe}")
    assert app.datamodule.epochs == epochs
    assert app.task.frozen_dtype == frozen
    assert app.task.adapter.rank == 20
    if recipe == "paper":  # Llama-3 has steps of 16 texts in 80 and in 40 GB, and as many between validations
        for more, size in (([], 16), (["--config", "recipes/llama3_40gb"], 4)):
            app = build("--config", "commonsense_llama3", *more)
            parts = app.trainer.accumulate_grad_batches
            assert (app.datamodule.batch_size, parts, app.trainer.val_check_interval / parts) == (size, 16 // size, 200)
            assert app.task.gradient_checkpointing == bool(more)


def test_options_reach_the_adapter_and_the_trainer(build: Build) -> None:
    words = ["--model.adapter.rank", '{".*mlp.*": 4}', "--model.adapter.match", "lora:32", "--model.targets", "[mlp]"]
    app = build("--config", "quickstart", *words, "--trainer.limit_test_batches", "1")
    task, limit = app.task, app.config.trainer.limit_test_batches
    assert isinstance(task.adapter, RandLoRA)
    assert task.adapter.rank == {".*mlp.*": 4} and task.adapter.match == "lora:32" and task.targets == ["mlp"]
    assert limit == 1 and isinstance(limit, int), "one batch, and not all"


@pytest.mark.parametrize("way", ["words", "files", "one file"])
def test_an_inner_method_of_another_class_has_its_own_defaults(build: Build, way: str, tmp_path: Path) -> None:
    """LoRA's alpha is 1, RandLoRA's is 10."""
    outer, inner, both = (tmp_path / f"{name}.yaml" for name in ("outer", "inner", "both"))
    outer.write_text("model: {adapter: {class_path: DoRA, inner: {class_path: LoRA, rank: 3}}}")
    inner.write_text("model: {adapter: {class_path: DoRA, inner: RandLoRA}}")
    both.write_text("model: {adapter: {class_path: DoRA, init_args: {inner: {class_path: RandLoRA}}}}")
    words = {
        "words": ["--model.adapter", "DoRA", "--model.adapter.inner", "RandLoRA"],
        "files": ["--config", str(outer), "--config", str(inner)],
        "one file": ["--config", str(both)],
    }
    adapter = build("--config", "quickstart", *words[way]).task.adapter
    assert adapter.inner.options() == RandLoRA(seed=0).options() and adapter.inner.alpha == 10


def test_options_of_an_inner_method_are_kept(build: Build) -> None:
    inner = build("--config", "quickstart", "--model.adapter", "DoRA", "--model.adapter.inner.rank", "3").task.adapter
    assert isinstance(inner.inner, LoRA) and inner.rank == 3
    words = ["--model.adapter", "dora", "--model.adapter.inner", "randlora", "--model.adapter.inner.seed", "7"]
    write_config(app := build("--config", "quickstart", *words))
    assert "seed: 7" in (app.folder / "config.yaml").read_text()


def test_paths_of_modules_are_read_and_public_ones_written(build: Build, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(
        "trainer: {callbacks: [{class_path: randlora_pl.run.callbacks.ZeroShot}, {class_path: "
        "lightning.pytorch.callbacks.DeviceStatsMonitor}]}\n"
        "model: {class_path: randlora_pl.tasks.text_head.TextHeadTask, init_args: {name: tiny, pretrained: random, "
        "adapter: {class_path: randlora_pl.adapters.methods.nested.DoRA, init_args: {inner: "
        "{class_path: randlora_pl.adapters.methods.random_matrices.VeRA}}}}}\n"
    )
    app = build("--config", str(tmp_path / "old.yaml"))
    write_config(app)
    assert re.findall(r"class_path: (\S+)", (app.folder / "config.yaml").read_text()) == [
        "randlora_pl.run.callbacks.ZeroShot",
        "lightning.pytorch.callbacks.DeviceStatsMonitor",
        "randlora_pl.tasks.TextHeadTask",
        "randlora_pl.adapters.DoRA",
        "randlora_pl.adapters.VeRA",
    ]


@pytest.mark.parametrize(
    ("name", "epochs", "flip", "weights"),
    [
        pytest.param("tiny_clip", 10, False, "emoji-fashion", marks=pytest.mark.full),
        ("dinov2_vitb14", 5, True, "timm"),
        ("glue_roberta_base", 10, None, None),
    ],
)
def test_resolved_config_has_epochs_flip_and_weights(
    build: Build, name: str, epochs: int, flip: bool | None, weights: str | None
) -> None:
    app = build("--config", name)
    write_config(app)
    resolved = yaml.safe_load((app.folder / "config.yaml").read_text())
    model, data = resolved["model"]["init_args"], resolved["data"]
    assert data["epochs"] == epochs and data.get("flip") is flip
    assert model["pretrained"] == weights and model["learning_rate"] == app.task.learning_rate
    again = build("--config", str(app.folder / "config.yaml"), "--data.steps", "5").datamodule
    assert (again.steps, again.epochs) == (5, None)


def test_one_seed_feeds_model_data_and_bases(build: Build) -> None:
    app = build("--config", "quickstart", "--seed_everything", "5")
    assert app.task.seed == app.datamodule.seed == app.task.adapter.seed == 5
    app = build("--config", "quickstart", "--seed_everything", "5", "--model.adapter.seed", "7")
    assert (app.task.seed, app.task.adapter.seed) == (5, 7)


def test_loggers_are_chosen_by_name(build: Build) -> None:
    app = build("--config", "quickstart", "--run.logger", "[tensorboard,csv]")
    assert [type(logger) for logger in app.trainer.loggers] == [TensorBoardLogger, CSVLogger]
    assert all(Path(str(logger.log_dir)).parent == app.folder for logger in app.trainer.loggers)
    assert build("--config", "quickstart", "--run.logger", "none").trainer.loggers == []


def test_only_the_first_process_removes_the_folder(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    app = build("--config", "quickstart")
    with monkeypatch.context() as patched:
        patched.setattr(rank_zero_only, "rank", 1)
        app.discard()
    assert app.folder.is_dir()
    app.discard()
    assert not Path("runs").exists()


def test_callbacks_of_the_user_come_on_top(build: Build) -> None:
    words = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    names = [type(c).__name__ for c in build("--config", "quickstart", *words).trainer.callbacks]
    assert "EarlyStopping" in names and names.count("RunCheckpoint") == names.count("ProgressBar") == 1


def test_help_of_classes_is_printed(run: Callable[..., object], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", "--trainer.callbacks.help", "lightning.pytorch.callbacks.EarlyStopping")
    assert stop.value.code == 0
    assert "stopping_threshold" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("fit", "--help-all")
    page = " ".join(capsys.readouterr().out.split())
    assert "--trainer.precision" in page and "Micro-batch size per device." in page


@pytest.mark.parametrize("flags", ["", "=skip_default"])
def test_printed_config_is_a_config(
    run: Callable[..., object], capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: str
) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--config", "quickstart", "--model.adapter", "LoRA", f"--print_config{flags}")
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert (len(file.read_text().splitlines()) < 60) == bool(flags), "skip_default leaves out Lightning's defaults"
    assert isinstance(App(prepare("fit", ["--config", str(file)])).task.adapter, LoRA)
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize("kinds", [float | int | None, int | float, Optional[Union[float, int]]])  # noqa: UP007, UP045
def test_whole_numbers_stay_whole(kinds: Any) -> None:
    """Whatever order ``typing`` gives: 1 test batch is one, 1.0 are all."""
    parser = RunParser(exit_on_error=False)
    parser.add_argument("--limit", type=kinds)
    _whole_numbers_first(parser)
    for word, value in (("1", 1), ("1.0", 1.0), ("0.5", 0.5)):
        found = parser.parse_args([f"--limit={word}"]).limit
        assert found == value and type(found) is type(value)


def test_letters_beyond_16_bits_reach_the_parser(build: Build, tmp_path: Path) -> None:
    name = "\U0001f600\u2028\x85 \\U0001f600é"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"dataset": "digits", "templates": [f"{name} {{}}"]}}))
    assert build("--config", "c.yaml").datamodule.templates == [f"{name} {{}}"]


def test_lightnings_timer_can_be_written(build: Build) -> None:
    app = build("--config", "quickstart", "--trainer.callbacks", "Timer")
    assert "interval: step" in app.parser.dump(app.config)

"""Mistakes of commands and configs: types, values that cannot be combined, and all of a file at once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from randlora_pl.run.options.compose import DEFAULTS, compose
from randlora_pl.run.options.mistakes import LOGGERS, check_names, line_numbers, mistakes_in
from randlora_pl.run.options.shipped import config_names
from tests.support.cli import Refused, Run
from tests.support.products import in_one_item

FIVE = """\
# five mistakes
model:
  class_path: VisionLanguageTask
  init_args:
    learning_rate: fast
    adapter:
      class_path: RandLora2
data:
  dataset: digts
  shots: 4
  fraction: 0.5
  batch_sise: 3
"""

PARTS = '--model.adapter Together --model.adapter.parts [{"class_path":"LoRA","'
INNER = '--model.adapter DoRA --model.adapter.inner Together --model.adapter.inner.parts [{"class_path":"LoRA","'
NAMES = {
    "--data.datset digits": "Did you mean --data.dataset",
    "--data.dataset digts": "Did you mean 'digits'",
    "--model.adapter Lora2": "'LoRA'",
    "--model.adapter.rnk 4": "--model.adapter.rank",
    "--model.init_args.adapter.init_args.rnk 4": "--model.adapter.rank",
    "--model.adapter DoRA --model.adapter.inner LoRA --model.adapter.inner.rnk 4": "--model.adapter.inner.rank",
    "--model.adapter DoRA --model.adapter.rank 4": "Did you mean --model.adapter.inner.rank?",
    "--model.adapter Together --model.adapter.rank 4": "It belongs to one of the parts: --model.adapter.parts '[{cla",
    "--model.adapter.parts [LoRA,RandLoRA]": "It belongs to Together: --model.adapter Together.",
    "--model.adapter Together --model.adapter.parts LoRA": "give a list, such as",
    '--model.adapter Together --model.adapter.parts [{"rank":2}]': "give a list, such as '[{class_path: LoRA",
    "--model.adapter Together --model.adapter.parts [LoRA,LoRB]": "Did you mean 'LoRA'",
    "--model.adapter Together --model.adapter.parts [LoRA,LoRAX]": "Unknown adapter 'LoRAX' (--model.adapter.parts).",
    f'{PARTS}rnk":2}},LoRA]': "--model.adapter.parts: LoRA has no option 'rnk'. Did you mean 'rank'?",
    f'{INNER}rnk":2}},LoRA]': "--model.adapter.inner.parts: LoRA has no option 'rnk'. Did you mean 'rank'?",
    f'{PARTS}targets":"q"}},LoRA]': "all parts adapt the same layers. Set --model.targets instead",
    "--model VisionTask": "'VisionLanguageTask'",
    "--rank 4": "Did you mean --model.adapter.rank",
    "--seed 4": "Did you mean --seed_everything",
    "--data.seed 4": "Did you mean --seed_everything",
    "--checkpoint.every 4": "--checkpoint.every_n_steps",
    "--modle.name tiny": "--model.name",
    "--model.name ViT-B-33": "Did you mean 'ViT-B-32'",
    "--resum folder": "Unknown option --resum",
    "--dryrun": "Did you mean --dry-run",
    "--print_config=skip_defaults": "Did you mean 'skip_default'",
    "--model.label_smoothing 0.1": "needs a softmax over all classes: --model LinearHeadTask or TextHeadTask.",
    "--model.adapter LoRA --model.adapter.num_bases 4": "Unknown option --model.adapter.num_bases",
    "--model.adapter LoRA --model.adapter.basis normal": "It belongs to RandLoRA: --model.adapter RandLoRA.",
    "--model.adapter GaLore --model.adapter.match lora:32": "because it trains the model's own tensors.",
    "--model.loss_batch local --model LinearHeadTask": "It belongs to PromptTask, VisionLanguageTask: --model",
    "--lr 0.1": "Did you mean --model.learning_rate?",
    "--confg lora": "Did you mean --config?",
    "--model PromptTask --model.prompts CoOpp": "Unknown prompt learner 'CoOpp' (--model.prompts). Did you mean",
    "--model PromptTask --model.prompts.lenght 4": "Did you mean --model.prompts.length?",
    "--model PromptTask --model.prompts.depth 4": "It belongs to DeepPrompts, MaPLe: --model.prompts DeepPrompts",
    "--model PromptTask --model.regulation DePT": "Unknown regulation 'DePT'",
    "--model.prompts CoOp": "It belongs to PromptTask: --model PromptTask.",
    "--checkpoint.monitor val/acuracy": "Did you mean 'val/acc'",
    "--model.help Nope": "Unknown task 'Nope' (--model.help).",
    "--model.adapter.help Nope": "(--model.adapter.help). Did you mean 'NoLA'? Known: AdaLoRA, AutoLoRA, BitFit, DoRA",
}
VALUES = {
    "--trainer.max_epochs -1": "trainer.max_epochs is -1",
    "--config quickstart --trainer.max_epochs": "expected one argument",
    "--checkpoint.monitor val/f1": "checkpoint.monitor is 'val/f1'",
    "--run.logger nonsense": "wandb, mlflow, none or a list such as '[nonsense]', not nonsense. Did you mean 'none'",
    "--run.logger [csv,nonsense]": "--run.logger[1]: expected tensorboard, csv, wandb, mlflow or none, not nonsense",
    "--run.logger null": "not null",
    "--config quickstart --run.name a/b": "without slashes",
    "--data.dataset folder": "needs --data.root",
    "--data.dataset folder --data.root nowhere": "The data folder nowhere does not exist; expected CLASS/IMAGE",
    "--data.dataset cifar10 --data.root nowhere": "CIFAR-10 is missing or damaged in nowhere; expected cifar-10",
    "--data.dataset fgvcaircraft": "fgvc-aircraft-2013b",
    "--data.shots 0": "--data.shots: expected a whole number from 1",
    "--data.batch_size 3.5": "--data.batch_size: expected a whole number from 1 to 16,777,216, not 3.5",
    "--data.crop_scale 3": "--data.crop_scale: expected a list",
    "--seed_everything -1": "--seed_everything is -1",
    "--checkpoint.test bset": "--checkpoint.test: expected last or best, not bset. Did you mean 'best'?",
    "--checkpoint.every_n_steps 0": "every_n_steps: expected a positive whole number, not 0",
    "--model.learning_rate fast": "--model.learning_rate: expected a positive number, not fast",
    "--model CausalLMTask --data.dataset jsonl --data.root x.jsonl": "The data folder x.jsonl does not exist",
    "--model CausalLMTask --data.dataset e2e --data.batch_size 0": "--data.batch_size: expected a whole number from 1",
    "--model.adapter 8": "model.adapter is 8",
    "--model.adapter.rank abc": "--model.adapter.rank: expected a positive whole number or a mapping",
    f'{PARTS}rank":"x"}},LoRA]': "--model.adapter.parts.0.rank: expected a positive whole number or a mapping",
    "--model.adapter.basis ternry": "binary, ternary or hadamard, not ternry. Did you mean 'ternary'?",
    "--model.adapter.dropout 2": "dropout: expected a number from 0 to below 1, not 2",
    "--trainer.accumulate_grad_batches many": "--trainer.accumulate_grad_batches: expected a whole number",
    "--trainer.precision 31": "--trainer.precision: expected transformer-engine, ",
    "--config quickstart --trainer.accelerator gpuu": "gpuu",
    "--config quickstart --trainer.callbacks foo": "--trainer.callbacks",
    "--config quickstart --trainer.callbacks ModelCheckpoint": "needs --trainer.enable_checkpointing true",
    r'--model.targets [".*attn\.(q|v)"]': "Put single quotes inside",
}


@in_one_item(("words", "message"), [*NAMES.items(), *VALUES.items()])
def test_mistakes_are_told_in_a_line(refused: Refused, words: str, message: str) -> None:
    told = refused("fit", *words.split())
    lines = 1 + ("missing or damaged" in told)  # the second is the command that gets the data
    assert message in told and told.count("\n") == lines


def test_five_mistakes_are_found_at_once_each_with_its_line(run: Run) -> None:
    Path("five.yaml").write_text(FIVE)
    checked = run("config", "check", "five.yaml")
    assert checked.code == 2 and checked.err == "randlora-pl: error: five.yaml has 5 mistakes.\n"
    words = (
        "learning_rate: expected a positive number",
        "Unknown adapter",
        "Unknown dataset",
        "cannot be combined",
        "data.batch_sise",
    )
    for line, number, word in zip(checked.out.splitlines(), (5, 7, 9, 10, 12), words, strict=True):
        assert line.startswith(f"five.yaml, line {number}: ") and word in line


def test_a_mistyped_value_hides_no_other_mistake(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {batch_size: many, steps: 3, epochs: 2, shots: 0}\nrun: {logger: x}\n")
    found = mistakes_in(tmp_path / "c.yaml")
    assert len(found) == 4
    assert all(
        word in " ".join(found)
        for word in ("not many", "--data.epochs 2", "--data.shots: expected a whole number from 1", "run.logger")
    )


def test_a_class_of_the_data_is_an_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data:\n  class_path: ImageData\n  init_args: {dataset: digits}\n")
    found = mistakes_in(tmp_path / "c.yaml")
    assert len(found) == 2 and all("Unknown key data." in line and "directly under data" in line for line in found)


def test_an_option_that_needs_a_value_is_not_null(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "model: {pretrained: null, name: null, adapter: {class_path: LoRA, init_args: {alpha: null}}}\n"
        "data: {sampling: null, epochs: null}\nrun: {logger: null, name: null}\n"
    )
    found = [line.split(": ")[1].lstrip("-") for line in mistakes_in(tmp_path / "a.yaml")]
    assert found == [
        "model.adapter.alpha",
        "model.name",
        "data.sampling",
        "run.logger",
    ]


def test_what_yaml_reads_as_a_boolean_or_a_number_is_not_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "data: {resize: no, shots_file: false, batch_size: 6.0}\nmodel: {pretrained: 5}\nrun: {logger: [csv]}\n"
    )
    found = [line.split(": ", 1)[1] for line in mistakes_in(tmp_path / "a.yaml")]
    given = {"data.resize": False, "data.shots_file": False, "model.pretrained": 5}
    assert sorted(found) == [f"--{key}: expected a text, not {value}" for key, value in given.items()]


def test_a_quoted_number_is_a_number(tmp_path: Path) -> None:
    length, size = 'trainer: {max_epochs: "2"}', 'data: {batch_size: "16", fraction: "1e-1"}'
    for text, wrong in ((length, 0), (size, 0), ('data: {steps: "7"}', 0), ('data: {batch_size: "0"}', 1)):
        (tmp_path / "a.yaml").write_text(text)
        found = mistakes_in(tmp_path / "a.yaml")
        assert len(found) == wrong and all("batch_size: expected a whole number from 1" in line for line in found)


def test_what_is_no_config_of_a_run_is_one_line(refused: Refused, tmp_path: Path) -> None:
    for text, word in (("a: [1", "not valid YAML"), ("methods: {a: {}}\n", "several runs: randlora-pl sweep")):
        (tmp_path / "c.yaml").write_text(text)
        assert word in refused("config", "check", "c.yaml")
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert "c.yaml is empty" in refused("fit", "--config", "c.yaml")


@in_one_item("name", [name for name in config_names() if not name.startswith("sweeps/")])
def test_shipped_configs_have_no_mistakes(name: str) -> None:
    found = mistakes_in(config_names()[name])
    if name in ("qwen3_0.6b", "smollm2_135m"):  # of the user's own texts, whose place only the user knows
        assert "needs --data.root: a folder" in found.pop()
    assert found == []


def test_lines_of_options_leave_out_the_words_that_only_yaml_needs(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(FIVE)
    lines = line_numbers(tmp_path / "c.yaml")
    assert (lines["model"], lines["model.learning_rate"], lines["model.adapter"], lines["data.shots"]) == (3, 5, 7, 10)


def test_a_wrong_type_in_a_config_names_file_and_line(refused: Refused, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(FIVE.replace("RandLora2", "LoRA").replace("digts", "digits").replace("  batch_sise: 3\n", ""))
    assert f"not fast in {config}, line 5" in refused("fit", "--config", str(config))


def test_a_logger_without_its_package_names_our_extra(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(LOGGERS, name, "no_such_package")
        told = refused("fit", "--config", "lora", "--run.logger", name)
        assert f"{name} needs" in told and "pip install 'randlora-pl[no_such_package]'" in told


def test_a_run_has_no_mistakes_and_the_metrics_that_can_be_monitored(finished: Path) -> None:
    from randlora_pl.tasks.objective import Objective

    assert mistakes_in(finished / "config.yaml") == []
    results = json.loads((finished / "results.json").read_text())
    names = {each.name for each in Objective.measures}
    assert {name.removeprefix("val/") for name in results if name.startswith("val/")} == names


def test_wrong_keys_name_their_file(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {datset: digits}")
    message = refused("fit", "--config", "quickstart", "--config", str(file))
    assert "data.datset" in message and "mine.yaml" in message
    file.write_text("model: {init_args: {adapter: {class_path: LoRA, init_args: {rnk: 3}}}}")
    assert "model.adapter.rnk" in refused("fit", "--config", str(file))


def test_classes_are_spelled_right_and_foreign_ones_left_alone(own: Callable[[], None]) -> None:
    command = compose("fit", ["--model", "textheadtask", "--model.adapter=lora"], DEFAULTS)
    check_names(command)
    assert command.typed == ["--model", "TextHeadTask", "--model.adapter", "LoRA"]
    for name in ("torch.nn.Linear", "torch.nn.LoRA"):
        foreign = compose("fit", ["--model.adapter", name, "--model.adapter.any", "1"], DEFAULTS)
        check_names(foreign)
        assert foreign.values["model.adapter"] == name


def test_help_of_a_class_has_the_options_as_they_are_typed(run: Run, refused: Refused) -> None:
    page = run("fit", "--model.adapter.help", "vera").out
    assert page.startswith("VeRA") and "\n  --model.adapter.rank  " in page
    assert run("fit", "--model.adapter", "VeRA", "--model.adapter.help").out == page
    assert "\n  --model.num_beams " in run("test", "--model.help=CausalLMTask").out
    assert "'LinearHeadTask'" in refused("fit", "--model.help", "LinearHead")

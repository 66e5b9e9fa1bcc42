from collections.abc import Callable
from pathlib import Path

from randlora_pl.run.options.compose import DEFAULTS, compose
from randlora_pl.run.options.mistakes import check_names
from tests.support.cli import Refused, Run
from tests.support.products import in_one_item

PARTS = '--model.adapter Together --model.adapter.parts [{"class_path":"LoRA","'

INNER = '--model.adapter DoRA --model.adapter.inner Together --model.adapter.inner.parts [{"class_path":"LoRA","'


@in_one_item(
    ("words", "hint"),
    [
        ("--data.datset digits", "Did you mean --data.dataset"),
        ("--data.dataset digts", "Did you mean 'digits'"),
        ("--model.adaptr LoRA", "Did you mean --model.adapter"),
        ("--model.adapter Lora2", "'LoRA'"),
        ("--model.adapter.rnk 4", "--model.adapter.rank"),
        ("--model.init_args.adapter.init_args.rnk 4", "--model.adapter.rank"),
        ("--model.adapter DoRA --model.adapter.inner LoRA --model.adapter.inner.rnk 4", "--model.adapter.inner.rank"),
        ("--model.adapter DoRA --model.adapter.rank 4", "Did you mean --model.adapter.inner.rank?"),
        (
            "--model.adapter Together --model.adapter.rank 4",
            "It belongs to one of the parts: --model.adapter.parts '[{cla",
        ),
        ("--model.adapter.parts [LoRA,RandLoRA]", "It belongs to Together: --model.adapter Together."),
        (
            "--model.adapter Together --model.adapter.parts LoRA",
            "give a list, such as",
        ),
        ('--model.adapter Together --model.adapter.parts [{"rank":2}]', "give a list, such as '[{class_path: LoRA"),
        ("--model.adapter Together --model.adapter.parts [LoRA,LoRB]", "Did you mean 'LoRA'"),
        (f'{PARTS}rnk":2}},LoRA]', "--model.adapter.parts: LoRA has no option 'rnk'. Did you mean 'rank'?"),
        (f'{PARTS}rank":"x"}},LoRA]', "--model.adapter.parts.0.rank: expected a positive whole number or a mapping"),
        (f'{INNER}rnk":2}},LoRA]', "--model.adapter.inner.parts: LoRA has no option 'rnk'. Did you mean 'rank'?"),
        (f'{PARTS}targets":"q"}},LoRA]', "all parts adapt the same layers. Set --model.targets instead"),
        ("--model VisionTask", "'VisionLanguageTask'"),
        ("--rank 4", "Did you mean --model.adapter.rank"),
        ("--shots 4", "Did you mean --data.shots"),
        ("--seed 4", "Did you mean --seed_everything"),
        ("--data.seed 4", "Did you mean --seed_everything"),
        ("--trainer.max_epoch 4", "--trainer.max_epochs"),
        ("--checkpoint.every 4", "--checkpoint.every_n_steps"),
        ("--modle.name tiny", "--model.name"),
        ("--resum folder", "Unknown option --resum"),
        ("--model.label_smoothing 0.1", "needs a softmax over all classes: --model LinearHeadTask or TextHeadTask."),
        ("--model.adapter LoRA --model.adapter.num_bases 4", "Unknown option --model.adapter.num_bases"),
        ("--model.adapter LoRA --model.adapter.basis normal", "It belongs to RandLoRA: --model.adapter RandLoRA."),
        ("--model.adapter GaLore --model.adapter.match lora:32", "because it trains the model's own tensors."),
        ("--model.loss_batch local --model LinearHeadTask", "It belongs to PromptTask, VisionLanguageTask: --model"),
        ("--lr 0.1", "Did you mean --model.learning_rate?"),
        ("--confg lora", "Did you mean --config?"),
        ("--data.batch-sise 4", "Did you mean --data.batch_size"),
        ("--model PromptTask --model.prompts CoOpp", "Unknown prompt learner 'CoOpp' (--model.prompts). Did you mean"),
        ("--model PromptTask --model.prompts.lenght 4", "Did you mean --model.prompts.length?"),
        ("--model PromptTask --model.prompts.depth 4", "It belongs to DeepPrompts, MaPLe: --model.prompts DeepPrompts"),
        ("--model PromptTask --model.head.wieght 4", "Did you mean --model.head.weight?"),
        ("--model PromptTask --model.regulation DePT", "Unknown regulation 'DePT'"),
        ("--model PromptTask --model.prompts.length x", "--model.prompts.length: expected a positive whole number"),
        ("--model.prompts CoOp", "It belongs to PromptTask: --model PromptTask."),
    ],
)
def test_wrong_names_get_near_ones(refused: Refused, words: str, hint: str) -> None:
    assert hint in refused("fit", "--config", "quickstart", *words.split())


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

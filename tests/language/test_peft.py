"""Adapters of language models in PEFT's form and back: the same logits on the same base model."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from randlora_pl.adapters import Adapter, LoRA, RandLoRA
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tasks.classification import TextClassificationTask
from randlora_pl.language.tasks.common import load_language_task
from tests.adapters.cases import randomise
from tests.support.cli import Refused, Run

from . import classify
from .small import make

IDS = torch.arange(3, 24).reshape(3, 7)


def moved(adapter: Adapter, folder: Path, kind: str = "qwen2", **options: Any) -> CausalLMTask:
    """A task whose adapter has moved, saved to a folder, in eval mode."""
    task = make("bytes", kind, adapter=adapter, **options)
    task.adapt()
    randomise(task.model, 0.3)
    task.save(folder)
    task.eval()
    return task


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for rounding, which is relative to the largest logit."""
    assert float((found - expected).abs().max()) < 3e-5 * float(expected.abs().max())


def test_there_and_back(run: Run, refused: Refused, tmp_path: Path) -> None:
    """Of a base model with other random weights it is refused."""
    task = moved(LoRA(rank={".*mlp.*": 3, ".*": 4}, alpha=6.0), tmp_path / "ours")
    shown = run("adapter", "export", str(tmp_path / "ours"), "--to", "peft", "--output", str(tmp_path / "peft"))
    assert shown.code == 0, shown.err
    assert "largest difference to PEFT's outputs" in shown.out and "random weights (seed 0)" in shown.out
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["base_model_name_or_path"] is None
    base = make("bytes").build().eval()
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "peft")).eval()
    same(logits(theirs), logits(task.model))
    assert (logits(base) - logits(task.model)).abs().max() > 0.01  # it changes something
    words = ("adapter", "import", "peft", "--from", "peft", "--model", "qwen2", "--pretrained", "random", "--output")
    back = run(*words, "back")
    assert back.code == 0, back.err
    assert "Largest difference to PEFT's outputs" in back.out and "a CausalLMTask" in back.out
    again = load_language_task(tmp_path / "back")
    same(logits(again.model), logits(task.model))
    saved = json.loads((tmp_path / "peft" / "task.json").read_text())
    saved["arguments"]["seed"] = 1
    (tmp_path / "peft" / "task.json").write_text(json.dumps(saved))
    assert "was trained on different weights" in refused(*words, "no")


def test_an_adapter_that_peft_trained(run: Run, tmp_path: Path) -> None:
    """Of a decoder in a folder, as its users have one; nothing but PEFT's own files."""
    task = make("bytes")
    base = task.build().eval()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    task.vocabulary.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    theirs.eval().save_pretrained(tmp_path / "peft")
    shown = run(
        "adapter", "import", str(tmp_path / "peft"), "--from", "peft", "--model", str(tmp_path / "base"), "--output",
        str(tmp_path / "ours"),
    )  # fmt: skip
    assert shown.code == 0, shown.err
    ours = load_language_task(tmp_path / "ours", name=str(tmp_path / "base"))
    same(logits(ours.model), logits(theirs))


def test_an_encoder_loads_by_the_printed_code(run: Run, tmp_path: Path) -> None:
    """With its head, which is in a file of its own."""
    plain: Any = transformers.RobertaModel(transformers.RobertaConfig(**classify.SHAPE)).eval()
    plain.save_pretrained(tmp_path / "base")
    classify.make().vocabulary.save_pretrained(tmp_path / "base")
    task = TextClassificationTask(str(tmp_path / "base"), adapter=LoRA(rank=2))
    task.set_classes(["a", "b"])
    task.adapt()
    randomise(task.model, 0.3)
    task.save(tmp_path / "ours")
    shown = run("adapter", "export", str(tmp_path / "ours"), "--to", "peft", "--output", str(tmp_path / "peft"))
    assert shown.code == 0 and "which PEFT does not read" in shown.out, shown.err
    names: dict[str, Any] = {**vars(transformers), "load_file": load_file, "PeftModel": PeftModel}
    exec("\n".join(re.findall("^  (.*)", shown.out, flags=re.M)), names)
    same(logits(names["base"].eval()), logits(task.completed(task.model).eval()))
    with torch.no_grad():
        before, after = (model(input_ids=IDS).last_hidden_state for model in (plain, task.model))
    assert float((before - after).abs().max()) > 0.01


def test_what_peft_cannot_hold_is_refused_with_the_reason(refused: Refused, tmp_path: Path) -> None:
    """Bases of k and v, which are smaller in grouped-query attention, and the order of columns by the equation."""
    moved(RandLoRA(rank=16), tmp_path / "ours")
    said = refused("adapter", "export", str(tmp_path / "ours"), "--to", "peft", "--output", str(tmp_path / "no"))
    assert "cannot be a PEFT adapter" in said and "adapter merge" in said and "--to lora --rank K" in said

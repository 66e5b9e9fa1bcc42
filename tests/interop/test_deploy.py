"""Adapters of decoders as other programs take them: merged weights, and one LoRA with its stated error."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="pip install '.[language]'")
pytest.importorskip("peft", reason="its PEFT adapters are loaded by it")

from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from randlora_pl.adapters import Adapter, FullFineTuning, LoRA, RandLoRA, read_adapter
from randlora_pl.interop import base_model
from randlora_pl.language import offline
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tasks.common import load_language_task
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import randomise
from tests.language.classify import make as encoder
from tests.language.small import make
from tests.support.cli import Refused, Run
from tests.support.products import marked

KINDS = ("llama", "qwen2", "phi3", "gpt2")
PROMPTS = ["2+2=", "a much longer prompt", "x"]


def saved(folder: Path, kind: str = "llama", adapter: Adapter | None = None) -> CausalLMTask:
    """Save a decoder's adapter that is not at its start; return the task, not merged."""
    task = make("bytes", kind, adapter=adapter or RandLoRA(rank=8), max_new_tokens=8)
    task.adapt()
    randomise(task.model, 0.1)
    task.save(folder, {"dataset": "chat", "val/loss": 1.0})
    task.eval()
    return task


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a plain model in float64."""
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def shown(text: str, label: str) -> float:
    """Return the number behind a label in what a command printed."""
    (number,) = re.findall(rf"{label}: ([\d.e+-]+)", text)
    return float(number)


def test_merged_weights_write_the_same_in_transformers(run: Run, tmp_path: Path) -> None:
    """By the loaders of transformers alone; and the base model by a scale of 0."""
    saved(tmp_path / "ours")
    for scale, name in (("1", "merged"), ("0", "base")):
        done = run("adapter", "merge", "ours", "--scale", scale, "--output", name)
        assert done.code == 0, done.err
    task = load_language_task(tmp_path / "ours")
    expected = task.write(PROMPTS)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for prompt, text in zip(PROMPTS, expected, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")
        assert tokens["input_ids"].tolist()[0] == task.vocabulary(prompt)["input_ids"]
        written = model.generate(**tokens, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True) == text
    assert len(set(expected)) > 1
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = make("bytes", "llama").build()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize(("kind",), marked(zip(KINDS), lambda row: row[0] == "llama", pytest.mark.slow))
def test_a_decoder_becomes_one_lora_within_its_stated_error(kind: str, run: Run, tmp_path: Path) -> None:
    """Errors and logits by a decomposition of NumPy; in PEFT the same, with one rank and one alpha for all layers."""
    task = saved(tmp_path / "ours", kind)
    done = run("adapter", "export", "ours", "--to", "lora", "--rank", "6", "--output", "lora")
    assert done.code == 0, done.err
    assert read_adapter(tmp_path / "lora").metadata["training"] == {"dataset": "chat"}  # questions get its template
    base = make("bytes", kind).build().eval()
    exact = base_model.logits(task.model)
    plain, tuned = weights(base), weights(load_language_task(tmp_path / "ours").model)
    near: dict[str, torch.Tensor] = {}
    missed = whole = 0.0
    for name, before in plain.items():
        change = (tuned[name] - before).numpy()
        near[name] = before.float()
        if not np.abs(change).max() > 0:
            continue
        rows = change.T if kind == "gpt2" else change
        blocks = np.split(rows, 3) if "c_attn" in name else [rows]
        parts = []
        for block in blocks:
            u, values, v = np.linalg.svd(block, full_matrices=False)
            parts.append(u[:, :6] * values[:6] @ v[:6])
            missed, whole = missed + float((values[6:] ** 2).sum()), whole + float((values**2).sum())
        kept = np.concatenate(parts)
        near[name] = (before + torch.from_numpy(kept.T if kind == "gpt2" else kept)).float()
    assert shown(done.out, "error") == pytest.approx((missed / whole) ** 0.5, rel=0.01) and missed > 0
    base.load_state_dict(near)
    expected = base_model.logits(base)
    torch.testing.assert_close(expected, base_model.logits(load_language_task(tmp_path / "lora").model))
    difference = shown(done.out, "largest difference of outputs on random tokens")
    assert difference == pytest.approx(float((expected[0] - exact[0]).abs().max()), rel=0.06)
    if kind == "gpt2":  # q and v of one weight become a larger rank there
        return
    done = run("adapter", "export", "lora", "--to", "peft", "--output", "peft")
    assert done.code == 0, done.err
    theirs: Any = PeftModel.from_pretrained(make("bytes", kind).build(), str(tmp_path / "peft")).eval()
    found = base_model.logits(theirs)
    torch.testing.assert_close(found, expected)
    assert float((found[0] - exact[0]).abs().max()) <= difference * 1.06
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == 6 and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["modules_to_save"] is None and config["bias"] == "none" and not config["use_dora"]
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


def test_sums_of_decoders_become_a_lora(run: Run, refused: Refused, tmp_path: Path) -> None:
    """Against a sum by hand; at full rank nothing is lost."""
    saved(tmp_path / "a")
    saved(tmp_path / "b", adapter=LoRA(rank=3))
    words = ("adapter", "add", "a", "b", "--weights", "1", "-0.5")
    said = refused(*words, "--output", "sum.safetensors")
    assert "--as lora --rank K" in said and "adapter merge a --output FOLDER" in said
    done = run(*words, "--as", "lora", "--rank", "64", "--output", "sum")
    assert done.code == 0 and "random tokens" in done.out, done.err
    plain, *tuned = (
        weights(model)
        for model in (make("bytes", "llama").build(), *(load_language_task(tmp_path / name).model for name in "ab"))
    )
    found = weights(load_language_task(tmp_path / "sum").model)
    for name, before in plain.items():
        by_hand = before + (tuned[0][name] - before) - 0.5 * (tuned[1][name] - before)
        torch.testing.assert_close(found[name], by_hand, rtol=0, atol=1e-5)


def test_what_is_no_lora_is_refused(refused: Refused, tmp_path: Path) -> None:
    """Encoders before their model is built, and updates of embeddings and norms."""
    task = encoder(adapter=LoRA(rank=2))
    task.set_classes(["a", "b"])
    task.adapt()
    task.save(tmp_path / "encoder")
    words = ("--to", "lora", "--rank", "2", "--output", "no")
    said = refused("adapter", "export", "encoder", *words)
    assert "an encoder of texts" in said and "adapter merge encoder --output FOLDER" in said
    said = refused("adapter", "add", "encoder", "--as", "lora", "--rank", "2", "--output", "no")
    assert "an encoder of texts" in said
    saved(tmp_path / "full", adapter=FullFineTuning())
    said = refused("adapter", "export", "full", *words)
    assert "have no place in a LoRA adapter" in said and "adapter merge" in said


@pytest.mark.slow
def test_smollm2_leaves_for_transformers_and_peft(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The language model of the wheel: the same texts by the same tokens, and the LoRA's stated error in PEFT."""
    try:
        offline.find_wheel()
    except UserError as absent:
        pytest.skip(str(absent))
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path / "cache"))
    task: Any = CausalLMTask(offline.NAME, adapter=RandLoRA(rank=32, pairing="peft"), max_new_tokens=12)
    task.adapt()
    randomise(task.model, 1e-3)
    task.save(tmp_path / "ours")
    task.eval()
    exact = base_model.logits(task.model)
    assert run("adapter", "merge", "ours", "--output", "merged").code == 0
    done = run("adapter", "export", "ours", "--to", "lora", "--rank", "16", "--output", "lora")
    assert done.code == 0, done.err
    stated = shown(done.out, "largest difference of outputs on random tokens")
    done = run("adapter", "export", "lora", "--to", "peft", "--output", "peft")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None  # its name is not one of the Hub
    assert config["r"] == 16 and not config["rank_pattern"] and not config["alpha_pattern"]
    (line,) = re.findall(r"base = (Auto.*)", done.out)
    base: Any = eval(line, {"AutoModelForCausalLM": AutoModelForCausalLM})
    theirs: Any = PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
    assert 0 < float((base_model.logits(theirs)[0] - exact[0]).abs().max()) <= stated * 1.06
    asked = [{"role": "user", "content": "What is 12 plus 7?\n\n3 words, please."}]
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "merged")
    how: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True}
    tokens = tokenizer.apply_chat_template(asked, return_tensors="pt", **how)
    assert tokens["input_ids"].tolist()[0] == task.vocabulary.apply_chat_template(asked, **how)["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    written = model.generate(**tokens, max_new_tokens=12, do_sample=False)
    prompt = task.vocabulary.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    (expected,) = task.write([prompt])
    assert tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True) == expected

"""Configs of current base models run by command, with random weights and without a network."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import lightning
import open_clip.factory
import pytest
from lightning.pytorch.callbacks import Callback
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from randlora_pl.models import clip
from tests.support.cli import Run

OWN_TOKENIZER = ("dinov3_vits16", "mobileclip2_s2", "pe_core_vitb16")
"""Configs whose prompts need no file of the Hub."""
LOCAL_TOKENIZER = ("siglip2_vitb16",)
"""Configs that run here with a small tokenizer in place of the Hub's."""
TEXTS = ("qwen3_0.6b", "smollm2_135m")
"""Configs of language models, of which smaller shapes run here."""
SMALLER = "{num_hidden_layers: 2, hidden_size: 144, intermediate_size: 128, vocab_size: 300}"
WORDS = [
    *("--model.pretrained", "random", "--data.steps", "2", "--data.batch_size", "2", "--data.eval_batch_size", "2"),
    *("--trainer.precision", "32-true", "--trainer.accelerator", "cpu"),
    *(
        "--trainer.limit_val_batches",
        "1",
        "--trainer.limit_test_batches",
        "1",
        "--trainer.enable_progress_bar",
        "false",
    ),
    *("--trainer.callbacks", "tests.models.test_current_models.Frozen"),
]


class Frozen(Callback):
    """Compares the frozen weights before and after the training."""

    compared: ClassVar[list[str]] = []

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remember them."""
        self.before = self.weights(pl_module)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compare them."""
        assert self.before and self.before == self.weights(pl_module)
        self.compared.append(pl_module.objective.name)  # type: ignore[union-attr, arg-type]

    def weights(self, module: lightning.LightningModule) -> dict[str, str]:
        """Return the hash of each frozen weight."""
        frozen = {
            name: each.detach().cpu().numpy() for name, each in module.named_parameters() if not each.requires_grad
        }
        return {name: hashlib.sha256(each.tobytes()).hexdigest() for name, each in frozen.items()}


def local_tokenizer(folder: Path) -> None:
    """Write a tokenizer of letters and words, with the special tokens of SigLIP2's."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def trained(run: Run, folder: Path, *words: str) -> Path:
    """Train by the command, and return the folder of the run, whose losses are finite and whose base is as before."""
    Frozen.compared.clear()
    result = run("fit", *words)
    assert result.code == 0, result.err
    assert len(Frozen.compared) == 1
    (place,) = {path.parent.resolve() for path in folder.glob("runs/*/*/results.json")}
    results = json.loads((place / "results.json").read_text())
    losses = [value for key, value in results.items() if key in ("val/loss", "test/loss")]
    assert losses and all(map(math.isfinite, losses)) and results["steps"] == 2, results
    return place


@pytest.mark.slow
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("name", [*OWN_TOKENIZER, *LOCAL_TOKENIZER])
def test_two_steps_and_a_prediction(name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in LOCAL_TOKENIZER:
        local_tokenizer(tmp_path / "tokenizer")
        config: Any = clip.resolve("ViT-B-16-SigLIP2", "random").config
        asked = config["text_cfg"]["hf_tokenizer_name"]
        loaded = open_clip.factory.HFTokenizer

        def from_here(source: str, *arguments: Any, **options: Any) -> Any:
            assert source == asked
            return loaded(str(tmp_path / "tokenizer"), *arguments, **options)

        monkeypatch.setattr(open_clip.factory, "HFTokenizer", from_here)
    folder = trained(run, tmp_path, "--config", name, *WORDS, "--data.dataset", "digits")
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "image.png")
    assert run("predict", "--adapter", str(folder / "adapter"), "--images", "image.png").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_two_steps_and_an_answer(name: str, run: Run, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "train.jsonl").write_text(20 * f"{json.dumps({'messages': turns})}\n")
    (tmp_path / "questions.txt").write_text("1 + 2?\n")
    words = ["--data.root", "chats", "--model.config_overrides", SMALLER, "--model.max_new_tokens", "4"]
    folder = trained(run, tmp_path, "--config", name, *WORDS, *words)
    assert run("predict", "--adapter", str(folder / "adapter"), "--texts", "questions.txt").code == 0

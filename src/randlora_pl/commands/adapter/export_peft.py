"""``adapter export --to peft``: a folder for ``PeftModel.from_pretrained``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.files.weights_files import local_name

if TYPE_CHECKING:
    from randlora_pl.models import ModelIdentity


def export(options: argparse.Namespace) -> int:
    """Write the folder, compare PEFT's outputs with ours, and print how to load it."""
    from randlora_pl.interop.peft.export import export_peft
    from randlora_pl.interop.peft.files import CONFIG, HEAD, TASK

    done = export_peft(options.adapter, options.output, peft_type=options.peft_type)
    shared = "randlora" in (options.output / CONFIG).read_text()  # PEFT up to 0.21 expects a copy in every layer
    size = sum(file.stat().st_size for file in options.output.iterdir())
    if done.difference is None:
        print(f"{options.output}: {size:,} bytes, not compared with PEFT ({done.why})")
    else:
        print(f"{options.output}: {size:,} bytes; largest difference to PEFT's outputs {done.difference.summary()}")
    if shared:
        print("PEFT warns of missing keys per layer when it loads this, because the file has the bases once.")
    if done.classifier:
        print(f"The head is the model's own classifier ({done.classifier}), its classes are in {TASK}.")
    elif done.head:
        print(f"PEFT cannot store the head. It is in {options.output / HEAD}, its classes in {TASK}.")
    identity = done.identity
    if identity is not None and identity.pretrained == "random":
        print(f"Its base model has random weights (seed {identity.seed}), which no other program builds.")
    elif identity is not None:
        print("Load it with:")
        print(f"  base = {_code(identity, options.output / TASK if done.classifier else None)}")
        print(f'  model = PeftModel.from_pretrained(base, "{options.output}")')
    return 0


def _code(identity: "ModelIdentity", task: Path | None) -> str:
    """Return the code that builds the base model without this program."""
    if identity.library == "transformers":
        return f'AutoModelForCausalLM.from_pretrained("{identity.pretrained}")'
    if identity.config_sha256 and identity.library == "open_clip":
        return f'open_clip.create_model("{identity.name}")'
    if identity.library == "timm":
        from timm.models import get_pretrained_cfg

        from randlora_pl.models.vit import vit_image_spec

        own = identity.config_sha256 is not None
        config = None if own else get_pretrained_cfg(identity.name)
        usual = None if config is None else config.input_size[-1]
        if own:
            usual = vit_image_spec(local_name(identity.as_dict(), "the adapter")).size
        given = f"num_classes={len(parse_json(task.read_text())['classnames']) if task is not None else 0}"
        given += f", img_size={identity.image_size}" if identity.image_size != usual else ""
        given += f', pretrained_cfg_overlay={{"file": "{identity.pretrained}"}}' if identity.sha256 and not own else ""
        return f'timm.create_model("{identity.name}", pretrained=True, {given})'
    if identity.name == "tiny":
        return 'randlora_pl.models.load_clip("tiny").model'
    return f'open_clip.create_model("{identity.name}", pretrained="{identity.pretrained}")'

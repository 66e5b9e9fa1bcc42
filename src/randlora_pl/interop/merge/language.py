"""Merged decoders and classifiers in transformers' folder format, verified before the folder gets its name."""

from pathlib import Path
from typing import Any

from randlora_pl.adapters import AdapterFile, merge_and_unload
from randlora_pl.adapters.injection import inject
from randlora_pl.adapters.input_dependent import check_fixed
from randlora_pl.adapters.io.base_hash import hash_weights
from randlora_pl.adapters.io.save_load import place_adapter
from randlora_pl.interop.compare_outputs import check_written, logits
from randlora_pl.interop.updates import interpolated
from randlora_pl.language.tasks.restore import plain_task
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import atomic_folder, disk_errors, refuse_inputs


def write_merged(
    file: AdapterFile, output: Path, scale: float = 1.0, overwrite: bool = False
) -> tuple[str, int, float]:
    """Write weights, configuration and tokenizer of W0 + scale (W - W0); a failed check leaves no files.

    Returns:
        Class of transformers that loads it, bytes of the folder, and the largest difference of logits on random tokens
        between the written model, loaded by transformers alone, and the adapted model.

    Raises:
        UserError: The folder exists, the base model or the outputs differ, or the disk is full.
    """
    check_fixed(file.adapter, file.path)
    refuse_inputs([output], [file.path])
    if output.exists() and not (overwrite and (output / "config.json").is_file()):
        raise UserError(f"{output} exists. Set another --output, or --overwrite to replace a model's folder.")
    task = plain_task(file, dequantized=True, gradient_checkpointing=False)
    model: Any = task.build()
    task.load_head(file.extra)
    whole_model = task.completed(model)
    plain = logits(whole_model)
    before = {name: value.clone() for name, value in model.state_dict().items()} if scale != 1 else {}
    wanted, here = file.config.get("base_model", {}).get("weights_sha256_sampled"), hash_weights(model)
    if wanted and wanted != here:
        raise UserError(f"{file.path} was trained on other weights ({wanted[:12]}) than {task.name} has ({here[:12]}).")
    inject(model, file.adapter, file.targets)
    place_adapter(model, file)
    whole_model.eval()  # new updates are in training mode; dropout would change the outputs
    expected = logits(whole_model)
    merge_and_unload(model)
    if before:
        model.load_state_dict(
            {name: interpolated(before[name], value, scale) for name, value in model.state_dict().items()}
        )
        expected = logits(whole_model)
    import transformers

    with disk_errors(output), atomic_folder(output) as part:
        whole_model.save_pretrained(part)
        task.vocabulary.save_pretrained(part)
        found = logits(getattr(transformers, task.auto).from_pretrained(part, dtype=model.dtype).eval())
        absolute = check_written(found, expected, plain, "logits of the merged model")
        size = sum(each.stat().st_size for each in part.rglob("*") if each.is_file())
    return task.auto, size, absolute

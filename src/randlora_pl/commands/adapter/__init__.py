"""Inspect, convert and share adapters.

ADAPTER is a folder, one .safetensors file, or a run (RUN, or runs/NAME for its newest run), whose tested adapter is
used.
"""

import os
from collections.abc import Mapping
from itertools import chain
from typing import Any

from randlora_pl import adapters, models
from randlora_pl.commands.common import entry, layer_table, print_json
from randlora_pl.run.options.adapter_config import check_adapter
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Adapter, Json, Weights
from randlora_pl.utils.text import printable
from randlora_pl.utils.weights_files import register_weights


def info(adapter: Adapter, *, layers: bool = False, json: Json = False, pretrained: Weights = ()) -> int:
    """Describe an adapter: method, base model, classes and training.

    Per layer, print rank, stable rank, effective rank and norm of its update, and the norm of the base model's weight.
    Nothing is downloaded. If the base model is not on this machine, only the facts in the file are printed.

    Examples:
        randlora-pl adapter info ADAPTER
        randlora-pl adapter info ADAPTER --json

    Args:
        layers: Print a row per layer instead of the mean per kind of layer

    Note:
        The columns of the table:
          rank            singular values above float32's rounding (max(out, in) * 1.2e-7 of the largest)
          stable rank     ||D||_F^2 / ||D||_2^2
          effective rank  exp of the entropy of the normalized singular values (Roy and Vetterli, 2007)
          norm            Frobenius norm; ratio: to the norm of the base model's weight
    """
    register_weights(pretrained)
    check_adapter(adapter)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a look at a file must not fetch a model; cached files are found
    from randlora_pl.interop import summary

    file = adapters.read_adapter(adapter)
    known = summary.facts(file)
    if not json:
        for name, text in described(known).items():
            print(entry(name, text, 0, 16))
    rows, missing = summary.layers(file)
    if json:
        return print_json(known | {"layers": rows, "missing": missing})
    if known["fingerprint"] and not any(reason.startswith("updates:") for reason in missing):
        print(entry("checked", "the random bases match that fingerprint", 0, 16))
    if rows:
        columns = {
            "rank": "rank",
            "stable_rank": "stable rank",
            "base_stable_rank": "base's",
            "effective_rank": "effective rank",
            "base_effective_rank": "base's",
            "norm": "norm",
            "base_norm": "base's",
            "ratio": "ratio",
        }
        print(f"\n{layer_table(rows, columns, layers)}")
    for reason in missing:
        print(f"not shown, {printable(reason)}")
    return 0


def described(known: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts of an adapter as text."""
    base = known["base_model"]
    named = " ".join(str(base[key]) for key in ("library", "name", "pretrained") if base.get(key))
    extra = [f"{key} {base[key]}" for key in ("image_size", "seed") if base.get(key) is not None]
    digest = str(base.get("weights_sha256_sampled") or "unknown")[:12]
    head = f" and {known['head_parameters']:,} of a head" if known["head_parameters"] else ""
    head = f" and {known['prompt_parameters']:,} of prompts{head}" if known["prompt_parameters"] else head
    head += f", {known['kept_numbers']:,} numbers kept without a gradient" if known["kept_numbers"] else ""
    size = f"{known['tensor_bytes']:,} bytes of {', '.join(known['dtypes'])}, {known['file_bytes']:,} on the disk"
    options = ", ".join(f"{key} {_short(value)}" for key, value in known["options"].items() if value is not None)
    texts = {
        "adapter": f"{known['path']} (format {known['format_version']})",
        "method": f"{known['method']}{': ' if options else ''}{options}",
        "trained": f"{known['parameters']:,} parameters{head}, {size}",
        "base model": ", ".join([named or "not named", *extra, f"weights {digest}"]),
        "targets": f"{'default' if known['targets'] is None else _short(known['targets'])}: {known['adapted']} tensors",
    }
    frame, names = known["training"].get("frame"), known["classnames"]
    first = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    bases = f"seed {known['seed']}, {known['generator']}, fingerprint {str(known['fingerprint'])[:12]}"
    texts |= {
        "trained whole": _short(known["trained"]) if known["trained"] else "",
        "random bases": bases if known["fingerprint"] else "",
        "task": known["task"],
        "captions" if known["captions"] else "classes": f"{len(names):,}: {first}" if names else "",
        "prompts": known["prompts"],
        **{name: _short(part) for name, part in known["learned"].items()},
        "training": _pairs({key: value for key, value in known["training"].items() if key != "frame"}),
        "images": models.ImageSpec.of_values(frame).summary() if frame else "",
        "made from": _pairs(known["made_from"]),
    }
    return {name: text for name, text in texts.items() if text}


def _pairs(known: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in known.items())


def _short(value: Any) -> str:
    """Return a value as short text; a table of patterns as its size."""
    if isinstance(value, dict) and value.keys() == {"method", "options"}:
        inner = ", ".join(f"{key} {_short(each)}" for key, each in value["options"].items() if each is not None)
        return f"{value['method']} ({inner})"
    if isinstance(value, dict) and len(value) > 4:
        return f"by {len(value)} patterns"
    if isinstance(value, list) and len(value) > 4:
        return f"{', '.join(map(str, value[:4]))}, ... ({len(value)})"
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def diff(first: Adapter, second: Adapter, *, layers: bool = False, json: Json = False, pretrained: Weights = ()) -> int:
    """Compare two adapters: method, options, base model, targets, classes and training.

    If base model and shapes are the same, print the norm of the difference of their updates and their cosine per layer.
    Nothing is downloaded.

    Examples:
        randlora-pl adapter diff A B

    Args:
        layers: Print a row per layer instead of the mean per kind of layer
    """
    register_weights(pretrained)
    for path in (first, second):
        check_adapter(path)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a look at a file must not fetch a model
    from randlora_pl.interop import base_model, summary

    files = [adapters.read_adapter(path) for path in (first, second)]
    one, two = (summary.facts(file) for file in files)
    why, rows = "", []
    try:
        base_model.same_base(files)
        rows = summary.compared(*map(base_model.layer_updates, files))
        if not rows:
            why = "no layer of one has the name and shape of a layer of the other"
    except UserError as error:
        why = str(error)
    changed = {key: [one[key], two[key]] for key in one if one[key] != two[key] and key not in ("path", "file_bytes")}
    if json:
        return print_json({"differences": changed, "layers": rows, "missing": [why] if why else []})
    print(entry("A", str(files[0].path), 0, 16))
    print(entry("B", str(files[1].path), 0, 16))
    texts = []  # one entry per option of the method and per metric of the training
    for known in (one, two):
        words = described({**known, "options": {}, "training": {}})
        del words["adapter"]
        words |= {f"option {key}": str(value) for key, value in known["options"].items()}
        texts.append(words | {f"training {key}": str(value) for key, value in known["training"].items()})
    keys = [key for key in dict.fromkeys(chain(*texts)) if texts[0].get(key) != texts[1].get(key)]
    if not keys:
        print("method, options, base model, seed, targets, classes and training are the same")
    for key in keys:
        print(entry(key, f"A: {texts[0].get(key, '-')}", 0, 16))
        print(entry("", f"B: {texts[1].get(key, '-')}", 0, 16))
    if rows:
        left_out = len(files[0].layers.keys() | files[1].layers.keys()) - len(rows)
        print()
        columns = {"norm_1": "norm of A", "norm_2": "norm of B", "difference": "norm of A - B", "cosine": "cosine"}
        print(layer_table(rows, columns, layers))
        if left_out:
            print(f"{left_out} layers of only one of them, or of other shapes, are left out")
        if all(row["difference"] == 0 for row in rows) and not left_out:
            print("the updates are the same, bit for bit")
    if why:
        print(f"updates not compared: {why}")
    return 0

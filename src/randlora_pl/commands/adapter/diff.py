"""``adapter diff``: differences of two adapters."""

import os
from itertools import chain

from randlora_pl import adapters
from randlora_pl.commands.adapter.info import described
from randlora_pl.commands.common.arguments import print_json
from randlora_pl.commands.common.tables import entry, layer_table
from randlora_pl.run.options.adapter_config import check_adapter
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.weights_files import register_weights
from randlora_pl.utils.option_types import Adapter, Json, Weights


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
    from randlora_pl.interop import base_model, summary, updates

    files = [adapters.read_adapter(path) for path in (first, second)]
    one, two = (summary.facts(file) for file in files)
    why, rows = "", []
    try:
        base_model.same_base(files)
        rows = summary.compared(*map(updates.layer_updates, files))
        if not rows:
            why = "no layer of one has the name and shape of a layer of the other"
    except UserError as error:
        why = str(error)
    changed = {key: [one[key], two[key]] for key in one if one[key] != two[key] and key not in ("path", "file_bytes")}
    if json:
        print_json({"differences": changed, "layers": rows, "missing": [why] if why else []})
        return 0
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

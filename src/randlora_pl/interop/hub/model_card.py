"""Model card of an adapter: description, results, usage and reproduction."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from randlora_pl.adapters import AdapterFile
from randlora_pl.utils.class_paths import with_public_paths
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.documents import parse_yaml
from randlora_pl.utils.files.weights_files import file_name, looks_like_file, without_local_paths
from randlora_pl.utils.text.formatting import byte_size
from randlora_pl.utils.text.tables import markdown_table

_CLASSES = 200  # further names are in adapter_config.json
_PLACE = "PATH"
"""Placeholder for paths on the author's machine."""

_USE = """\
## How to use it

```bash
pip install randlora-pl
randlora-pl adapter pull {repo} --output {name}
randlora-pl predict --adapter {name} --images PATH --output predictions.csv
randlora-pl adapter merge {name} --output merged.safetensors    # weights for open_clip or timm
randlora-pl adapter export {name} --to onnx --output model.onnx
```

```python
import torch
from randlora_pl.data import open_images
from randlora_pl.tasks import load_task

task = load_task("{name}")
images, files = open_images(["photo.jpg"], task.image_spec)
with torch.no_grad():
    for batch in images:
        shares = task.class_logits(batch["image"]).softmax(1)
        print([task.classnames[place] for place in shares.argmax(1)])
```
"""


_USE_TEXTS = """\
## How to use it

```bash
pip install "randlora-pl[language]"
randlora-pl adapter pull {repo} --output {name}
randlora-pl predict --adapter {name} --texts FILE --output predictions.csv
randlora-pl adapter merge {name} --output merged    # a folder for transformers
```

```python
from randlora_pl.language import load_language_task

task = load_language_task("{name}")
{call}
```
"""
_CALLS = {
    "CausalLMTask": 'print(task.write(["a prompt"]))',
    "TextClassificationTask": 'print(task.classnames, task.classify(["a text"]))',
}


def make_card(file: AdapterFile, repo: str, licence: str | None = None) -> str:
    """Return the text of ``README.md`` with the Hub's YAML header and without local paths.

    Args:
        file: Adapter; inside a run folder, the run's metrics and config are used.
        repo: Repository, USER/NAME.
        licence: SPDX identifier, for example ``apache-2.0``.

    Raises:
        UserError: A file of the run is damaged.
    """
    run = file.path.absolute().parent
    ours = file.path.name in ("adapter", "adapter-best") and (run / "config.yaml").is_file()
    results = _read(run / "results.json") if ours and file.path.name == "adapter" else {}
    config = _read(run / "config.yaml") if ours else {}
    name = repo.rpartition("/")[2]
    base = file.config.get("base_model", {})
    parts = [
        _header(file, licence, hub_id(base)),
        f"# {name}\n",
        _about(file, config),
        _figures(file, results),
        _use(file.metadata.get("task"), repo, name),
        _reproduce(file, config),
        _licence(licence),
    ]
    return "\n".join(part for part in parts if part)


def portable(value: Any) -> Any:
    """Return a config without local paths: absolute paths become ``PATH``, URLs lose their passwords."""
    if isinstance(value, Mapping):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [portable(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        return re.sub(r"//[^/@\s]*@", "//", value)
    return _PLACE if re.match(r"[/~\\]|[A-Za-z]:[\\/]", value) or ".." in Path(value).parts else value


def hub_id(base: Mapping[str, Any]) -> str | None:
    """Return the Hub id of a base model from its library's tables, or None."""
    name, tag = str(base.get("name", "")), str(base.get("pretrained", ""))
    if base.get("library") == "open_clip":
        import open_clip

        found = open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "")
    elif base.get("library") == "timm" and tag != "random" and not (base.get("sha256") or looks_like_file(tag)):
        from timm.models import get_pretrained_cfg

        try:
            found = getattr(get_pretrained_cfg(name), "hf_hub_id", None) or ""  # None: a name of another version
        except RuntimeError:  # a tag of another version
            found = ""
    else:
        found = ""
    found = found.strip("/")
    return found if found.count("/") == 1 else None


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON or YAML file of a run; return {} if it does not exist."""
    try:
        return dict(parse_yaml(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} is cut off or damaged ({type(error).__name__}). Move it away to push without it."
        ) from error


def _header(file: AdapterFile, licence: str | None, base: str | None) -> str:
    tags = ["randlora-pl", file.adapter.method().lower(), "peft", str(file.config.get("base_model", {}).get("library"))]
    header: dict[str, Any] = {"library_name": "randlora-pl"}
    header |= {"base_model": base, "base_model_relation": "adapter"} if base else {}
    header |= {"license": licence} if licence else {}
    captions = file.metadata.get("captions")
    if (task := file.metadata.get("task")) in _CALLS:
        header["pipeline_tag"] = "text-generation" if task == "CausalLMTask" else "text-classification"
    elif file.metadata.get("classnames"):
        header["pipeline_tag"] = "zero-shot-image-classification" if captions else "image-classification"
    return f"---\n{yaml.safe_dump(header | {'tags': tags}, sort_keys=False)}---\n"


def _about(file: AdapterFile, config: Mapping[str, Any]) -> str:
    metadata, base = file.metadata, without_local_paths(file.config).get("base_model", {})
    names = metadata.get("classnames") or []
    data = config.get("data", {}).get("dataset")
    count = sum(tensor.numel() for tensor in file.tensors.values())
    kind = "captions" if metadata.get("captions") else "classes"
    goal = f" for {len(names):,} {kind}" + (f" of the dataset `{data}`" if data else "") if names else ""
    model = " ".join(str(base[key]) for key in ("library", "name", "pretrained") if base.get(key))
    weights = str(base.get("weights_sha256_sampled") or "")[:12]
    shown = ("rank", "alpha", "basis", "inner")
    options = {name: value for name, value in file.adapter.options().items() if name in shown and value is not None}
    head = sum(t.numel() for t in file.extra.values()) if metadata.get("task") == "LinearHeadTask" else 0
    rows = {
        "base model": f"`{model}`" + (f", weights {weights}" if weights else ""),
        "method": f"{file.adapter.method()} {json.dumps(options) if options else ''}".strip(),
        "trained parameters": f"{count:,} in {len(file.layers):,} layers"
        + (f", and {head:,} of the head" if head else ""),
        "task": metadata.get("task"),
    }
    frame = metadata.get("training", {}).get("frame")
    if frame:
        padded = ", padded" if frame.get("resize") == "pad" else ""
        rows["images"] = f"{frame['size']} x {frame['size']} pixels{padded}, {frame['interpolation']}"
    text = f"A {file.adapter.method()} adapter of {model or 'a base model'}{goal}, trained with randlora-pl.\n\n"
    text += _table(rows)
    if not names:
        return text
    more = f" and {len(names) - _CLASSES:,} more, in adapter_config.json" if len(names) > _CLASSES else ""
    text += f"\n<details><summary>{len(names):,} {kind}</summary>\n\n```text\n"
    text += "\n".join(" ".join(str(name).split()).replace("```", "") for name in names[:_CLASSES])
    return text + f"\n```\n{more}\n</details>\n"


def _table(rows: Mapping[str, Any]) -> str:
    shown = [(key, str(value)) for key, value in rows.items() if value not in (None, "")]
    return "\n".join(markdown_table(("", ""), shown, (0, 1))) + "\n"


_NAMES = {
    "test/acc": "test accuracy", "test/loss": "test loss", "zeroshot/acc": "test accuracy before training",
    "val/acc": "validation accuracy", "data/test": "test images", "data/train": "training images",
    "data/shots": "shots", "steps": "optimizer steps", "effective_batch": "images a step",
    "images_per_second": "images a second", "fit_seconds": "seconds of training", "peak_memory_bytes": "peak memory",
    "device": "device", "seed": "seed",
    "version": "randlora-pl", "version/torch": "PyTorch",
}  # fmt: skip


def _figures(file: AdapterFile, results: Mapping[str, Any]) -> str:
    """Return the run's metrics, or those stored in the adapter's metadata."""
    own = {name: value for name, value in file.metadata.get("training", {}).items() if isinstance(value, int | float)}
    found = {label: _shown(key, results[key]) for key, label in _NAMES.items() if results.get(key) is not None}
    found |= {} if found else {_NAMES.get(key, key): _shown(key, value) for key, value in own.items()}
    return f"## Figures\n\n{_table(found)}" if found else ""


def _shown(key: str, value: Any) -> str:
    if key.endswith("/acc") or "recall" in key:
        return f"{100 * value:.2f} %"
    if key == "peak_memory_bytes":
        return byte_size(value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _use(task: str | None, repo: str, name: str) -> str:
    if task in _CALLS:
        return _USE_TEXTS.format(repo=repo, name=name, call=_CALLS[task])
    if task:
        return _USE.format(repo=repo, name=name)
    return (
        f"## How to use it\n\n```bash\npip install randlora-pl\nrandlora-pl adapter pull {repo} --output {name}\n"
        f"randlora-pl adapter merge {name} --output merged.safetensors    # weights for open_clip or timm\n```\n"
    )


def _reproduce(file: AdapterFile, config: Mapping[str, Any]) -> str:
    """Return the training command and its config."""
    if config:
        tree = {key: config[key] for key in ("seed_everything", "trainer", "model", "data") if key in config}
        settings = (tree.get("model") or {}).get("init_args") or {}
        if file.config.get("base_model", {}).get("sha256") and "pretrained" in settings:
            settings["pretrained"] = file_name(str(settings["pretrained"]))
        tree["trainer"] = {key: value for key, value in tree.get("trainer", {}).items() if value is not None}
        what = "Save this as `config.yaml`."
    elif file.metadata.get("task"):
        settings = without_local_paths(file.config)["metadata"]["arguments"] | {
            "adapter": _as_class(file.adapter.describe())
        }
        seed = settings.pop("seed", 0)  # the command line has one seed for everything
        tree = {"seed_everything": seed, "model": {"class_path": file.metadata["task"], "init_args": settings}}
        what = "The model's part of the config, as `config.yaml`; set the dataset with `--data.dataset`."
    else:
        return ""
    text = yaml.safe_dump(portable(with_public_paths(tree)), sort_keys=False, allow_unicode=True)
    places = f" `{_PLACE}` stands for paths on the author's machine." if f": {_PLACE}\n" in text else ""
    return (
        f"## How it was trained\n\n```bash\nrandlora-pl fit --config config.yaml\n```\n\n{what}{places}\n\n"
        f"<details><summary>config.yaml</summary>\n\n```yaml\n{text}```\n</details>\n"
    )


def _as_class(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method and its options in the form of a config."""
    options = {
        name: _as_class(value) if isinstance(value, dict) and "method" in value else value
        for name, value in description["options"].items()
    }
    return {"class_path": description["method"], "init_args": options}


def _licence(licence: str | None) -> str:
    own = f"`{licence}` for the adapter." if licence else "Its author has named none for the adapter."
    return f"## Licence\n\n{own} The base model and the data keep theirs.\n"

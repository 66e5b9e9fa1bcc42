"""Merged weights for open_clip and timm, verified in the library alone before the file gets its name."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile, merge_and_unload, save_load
from randlora_pl.data.unlabelled import frame_of
from randlora_pl.interop import base_model, summary
from randlora_pl.language.tasks.common import plain_task
from randlora_pl.models import ImageSpec, catalog, clip, encode_prompts, vit_image_spec, weights
from randlora_pl.tasks.restore import prompts_of
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import atomic_folder, disk_errors, disk_size, move, refuse_inputs, scratch_folder
from randlora_pl.utils.weights_files import local_name


@dataclass(frozen=True)
class LibraryModel:
    """Recipe of a model built by its library, ``open_clip`` or ``timm``, under its name there.

    ``options`` are further arguments of ``create_model``, ``config`` describes a model that open_clip does
    not have, and ``classifier`` is timm's classification layer; empty if there is not exactly one.
    """

    library: str
    name: str
    image: ImageSpec
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    classifier: str = ""

    @classmethod
    def make(cls, identity: Mapping[str, Any]) -> "LibraryModel":
        """Return the recipe for an identity (`ModelIdentity.as_dict`); for timm without a classifier."""
        size = identity.get("image_size")
        name = local_name(identity, "the adapter")
        if identity["library"] == "open_clip":
            tag = "random" if identity.get("sha256") else identity["pretrained"]  # a file has no further options
            source = clip.resolve(name, tag)
            options = {} if size in (None, clip.image_size(source)) else {"force_image_size": size}
            image = clip.image_spec(source, size)
            own = source.config if source.folder is not None or name == "tiny" else None
            return cls("open_clip", source.library_name, image, options, own)
        image, options = vit_image_spec(name, size), {}
        if catalog.is_folder(name):
            config, name, options = catalog.open_folder(name, "timm").timm_parts()
        else:
            config = timm.models.get_pretrained_cfg(name)
        options = options | {"num_classes": 0}
        if config.fixed_input_size and image.size != config.input_size[-1]:
            options["img_size"] = image.size
        classifier = config.classifier if isinstance(config.classifier, str) else ""
        return cls("timm", name, image, options, None, classifier)

    def load(self, path: Path) -> nn.Module:
        """Build the model and load every tensor of a file strictly, with the library's own functions."""
        with weights.quiet():
            if self.library == "timm":
                model: nn.Module = timm.create_model(self.name, checkpoint_path=str(path), **self.options)
            elif self.config is None:
                model = open_clip.create_model(self.name, pretrained=str(path), **self.options)
            else:
                if self.name == "tiny":
                    model = open_clip.CLIP(**self.config)
                else:
                    model = open_clip.create_model(self.name, load_weights=False, pretrained_text=False, **self.options)
                open_clip.load_checkpoint(model, str(path))
        return model.eval()

    def lines(self, path: Path) -> list[str]:
        """Return Python code that does the same; the model stores its image format (``visual.preprocess_cfg``)."""
        options = dict(self.options)
        if self.library == "open_clip":  # it would take its defaults for a weights file, not the tag's values
            image, usual = self.image, open_clip.transform.PreprocessCfg()
            shown: dict[str, Any] = {"mean": image.mean, "std": image.std, "interpolation": image.interpolation}
            if image.crop_pct == 1:  # else the mode alone would be another preprocessing
                shown |= {"resize_mode": image.resize}
            if image.crop_pct == 1 and image.resize == "longest":
                shown["fill_color"] = image.fill[0] if len(set(image.fill)) == 1 else image.fill
            if any(getattr(usual, name) != value for name, value in shown.items()):
                options["force_preprocess_cfg"] = shown
        more = "".join(f", {name}={value!r}" for name, value in options.items())
        if self.library == "timm":
            return ["import timm", f"model = timm.create_model({self.name!r}, checkpoint_path={str(path)!r}{more})"]
        name = self.name if self.config is None else config_file(path).stem
        add = [] if self.config is None else [f"open_clip.add_model_config({str(config_file(path))!r})"]
        create = f"model = open_clip.create_model({name!r}, pretrained={str(path)!r}{more})"
        return ["import open_clip", *add, create]

    def transform(self) -> list[str]:
        """Return Python code, after `lines`, that defines ``preprocess`` of a picture by the library's own transform.

        It is empty if the library has none: open_clip has no crop_pct.
        """
        image = self.image
        if self.library == "timm":
            modes = {"shortest": "center", "longest": "border", "squash": "squash"}
            if image.resize == "longest" and image.fill != image.filled_with_mean().fill:
                return []
            options: dict[str, Any] = {"interpolation": image.interpolation, "mean": image.mean, "std": image.std}
            options |= {"crop_pct": image.crop_pct, "crop_mode": modes[image.resize]}
            typed = ", ".join(f"{name}={value!r}" for name, value in options.items())
            made = [f"transform = timm.data.create_transform({image.size}, {typed})"]
        elif image.crop_pct != 1:
            return []
        else:
            made = [
                "config = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)",
                "transform = open_clip.transform.image_transform_v2(config, is_train=False)",
            ]
        return [
            *made,  # no library's transform lays transparent pictures on the background
            "from PIL import Image",
            "def preprocess(picture):",
            "    if picture.has_transparency_data:",
            "        over = picture.convert('RGBA')",
            f"        picture = Image.alpha_composite(Image.new('RGBA', over.size, {(*image.behind, 255)}), over)",
            "    return transform(picture.convert('RGB'))",
        ]

    def config_text(self) -> str:
        """Return the JSON configuration for ``open_clip.add_model_config``; only if open_clip has none."""
        return json.dumps(self.config, indent=2) + "\n"


def config_file(path: Path) -> Path:
    """Return the path of a weights file's configuration; its stem is the model's name."""
    return path.with_suffix(".json")


SUFFIXES = (".safetensors", ".pt")
_MADE_BY = "randlora-pl"


@dataclass(frozen=True)
class Written:
    """Files with their bytes, the largest absolute difference of outputs, Python lines to load them, and notes."""

    sizes: dict[Path, int]
    difference: float
    load: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Merged:
    """Weights to be written: the library's model, and the adapter whose classes and head are kept.

    ``expected`` are the outputs (`base_model.outputs`), computed before merging if possible, ``plain`` the base
    model's; ``text_changed`` is True if the text tower differs from the base model's. ``facts`` go to the metadata.
    """

    file: AdapterFile
    model: nn.Module
    expected: list[Tensor]
    plain: list[Tensor]
    text_changed: bool
    with_head: bool = True
    facts: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def library_model(self) -> LibraryModel:
        """Recipe of the library's model; for timm with the linear head as its classifier."""
        plain = LibraryModel.make(self.file.config["base_model"])
        plain = replace(plain, image=frame_of(self.file.metadata, plain.image))  # of the training, if different
        if plain.classifier and self.head is not None:
            plain.options["num_classes"] = len(self.head)
        elif plain.classifier and (own := self.model.state_dict().get(f"{plain.classifier}.weight")) is not None:
            plain.options["num_classes"] = len(own)  # trained alongside the adapter
        return plain

    @property
    def classnames(self) -> list[str]:
        """Class names; empty if the adapter was saved without a task or trained on captions."""
        return [] if self.file.metadata.get("captions") else list(self.file.metadata.get("classnames", []))

    @property
    def several(self) -> bool:
        """True if an image may have several of the classes."""
        return bool(self.file.metadata.get("several_labels"))

    @property
    def templates(self) -> list[str]:
        """Prompt templates whose embeddings are averaged per class; empty with a linear head."""
        return list(prompts_of(self.file).evaluation)

    @property
    def logit_scale(self) -> float:
        """Factor of a CLIP model's similarities."""
        raw = self.model.state_dict()["logit_scale"].float()
        exp = self.file.metadata.get("arguments", {}).get("logit_scale", "exp") == "exp"
        return float(raw.exp() if exp else raw)

    @cached_property
    def head(self) -> Tensor | None:
        """Weight that maps features to class logits, (classes, features); CLIP features have unit length.

        Saved class embeddings are used if the text tower is the base's; otherwise prompts are encoded again. None
        without classes or if ``with_head`` is False.
        """
        if not self.with_head or not self.classnames:
            return None
        if "head" in self.file.extra and not (self.templates and self.text_changed):
            return self.file.extra["head"].float()
        if not self.templates:
            return None
        tokenizer = clip.load_tokenizer(local_name(self.file.config["base_model"], self.file.path))
        return self.logit_scale * encode_prompts(self.model, tokenizer, self.classnames, self.templates, "cpu")

    @property
    def classifies(self) -> bool:
        """True if the head is a part of the library's model."""
        return bool(self.library_model.options.get("num_classes"))

    def contents(self, path: Path) -> dict[Path, bytes]:
        """Return the bytes of each file, the weights first, with metadata as text and JSON in safetensors files."""
        image = json.dumps(asdict(self.library_model.image))
        metadata = {"format": "pt", "made_by": _MADE_BY, "base": base_model.base_name(self.file), "image": image}
        if self.classnames:
            metadata["classnames"] = json.dumps(self.classnames)
            metadata |= {"probabilities": "sigmoid"} if self.several else {}
        if self.classnames and self.templates:
            metadata |= {"templates": json.dumps(self.templates), "logit_scale": repr(self.logit_scale)}
        metadata |= self.facts
        state = {name: tensor.detach().contiguous() for name, tensor in self.model.state_dict().items()}
        if self.head is not None and self.classifies:
            state[f"{self.library_model.classifier}.weight"] = self.head
            state[f"{self.library_model.classifier}.bias"] = self.head.new_zeros(len(self.head))  # our head has no bias
        files = {path: _bytes(state, metadata, path.suffix)}
        if self.library_model.config is not None:
            files[config_file(path)] = self.library_model.config_text().encode()
        if self.head is not None and not self.classifies:
            files[head_file(path)] = _bytes({"head": self.head}, metadata)
        return files


def merged(base: base_model.Base, file: AdapterFile, scale: float = 1.0, with_head: bool = True) -> Merged:
    """Return the base model with a merged adapter, W0 + scale (W - W0).

    Every tensor that the adapter changes is included, also trained biases and norms; scale 0 gives the base model bit
    for bit, 1 the tuned one. Tensors fully trained alongside the adapter are copied.
    """
    file.adapter.require_matrix("the merge", file.path)
    summary.check_merge(file, scale)
    made = base_model.adapted(base, file)
    expected = base.outputs(made.model) if scale == 1 else None
    merge_and_unload(made.part)
    plain = base.model.state_dict()
    state = {key: base_model.interpolate(plain[key], value, scale) for key, value in made.model.state_dict().items()}
    state |= base_model.beside(file, base.part)
    method = file.adapter.method()
    return _with_state(base, made.model, state, file, with_head, expected, method=method, scale=repr(scale))


def added(base: base_model.Base, file: AdapterFile, total: base_model.State) -> Merged:
    """Return the base model plus a sum of updates, rounded once; ``file`` is the adapter whose head is kept."""
    plain = base.model.state_dict()
    state = {
        key: (value.double() + total[key]).to(value.dtype) if key in total else value for key, value in plain.items()
    } | base_model.beside(file, base.part)
    return _with_state(base, base.copy().model, state, file, method="sum of adapters")


def _with_state(
    base: base_model.Base,
    model: nn.Module,
    state: base_model.State,
    file: AdapterFile,
    with_head: bool = True,
    expected: list[Tensor] | None = None,
    **facts: str,
) -> Merged:
    """Load weights, all of them finite, into a model of the library."""
    plain = base.model.state_dict()
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all() and plain[key].isfinite().all():
            raise UserError(
                f"{key} would not be finite (NaN or infinity), because training diverged. Nothing was written."
            )
    model.load_state_dict(state)
    text = any(not key.startswith("visual.") and not torch.equal(value, plain[key]) for key, value in state.items())
    expected = expected or base.outputs(model)
    return Merged(file, model, expected, base.outputs(base.model), text, with_head, facts)


def head_file(path: Path) -> Path:
    """Return the path of the head of a weights file, if the weights cannot contain it."""
    return path.with_suffix(".head.safetensors")


def check_output(path: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Check that writing weights overwrites nothing that should be kept.

    Raises:
        UserError: The suffix is not .safetensors or .pt, or the path is an input adapter or an existing file.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"--output is {path}. Set a file that ends in {' or '.join(SUFFIXES)}.")
    refuse_inputs([path, head_file(path)], inputs)
    _refuse_existing([path], overwrite)


def _refuse_existing(files: Iterable[Path], overwrite: bool) -> None:
    for file in files:
        if file.is_dir() or (file.exists() and not overwrite):
            remedy = "" if file.is_dir() else ", or --overwrite to replace it"
            raise UserError(f"{file} exists. Set another --output{remedy}.")


def write(path: Path, merged: Merged, overwrite: bool = False) -> Written:
    """Write merged weights under a temporary name, load and compare them in the library alone, then rename.

    Raises:
        UserError: The outputs differ by more than rounding, a file exists, or the disk is full; no files remain.
    """
    contents = merged.contents(path)
    left_over = []  # of older weights, if it was written here
    head, config = head_file(path), config_file(path)
    with suppress(SafetensorError, OSError), safe_open(head, framework="pt") as tensors:
        if head not in contents and (tensors.metadata() or {}).get("made_by") == _MADE_BY:
            left_over.append(head)
    tiny = LibraryModel.make({"library": "open_clip", "name": "tiny", "pretrained": "random"})  # not in open_clip
    if config not in contents and config.is_file() and config.read_bytes() == tiny.config_text().encode():
        left_over.append(config)
    _refuse_existing([*contents, *left_over], overwrite)
    expected, plain = merged.expected, merged.plain
    if merged.head is not None and merged.classifies:
        expected, plain = ([nn.functional.linear(features, merged.head)] for features, *_ in (expected, plain))
    with disk_errors(path), scratch_folder(path) as part:
        for file, content in contents.items():
            (part / file.name).write_bytes(content)
        library = merged.library_model
        actual = base_model.outputs(library.load(part / path.name), library.image.size)
        hint = "Try --no-head, and please" if merged.classifies else "Please"
        absolute = base_model.check_written(actual, expected, plain, "outputs of the merged model", hint)
        for file in left_over:
            file.unlink()  # it does not belong to the new weights
        for file in reversed(contents):  # weights last
            move(part / file.name, file)
    sizes = {file: len(content) for file, content in contents.items()}
    transform = library.transform()
    is_clip = library.library == "open_clip"
    notes = [f"images: {library.image.summary()}"]
    if not transform:
        lacks = "crop_pct" if is_clip else "other color than the mean to fill with"
        notes.append(f"{library.library} has no {lacks}: prepare images as described, without its transform")
    rounding = base_model.difference(merged.expected, merged.plain)[0] <= base_model.ROUNDING
    if rounding and merged.facts.get("scale") != "0.0":
        changed = base_model.change(merged.expected, merged.plain)
        by = f"by {changed:.1e}, which is rounding" if changed else "not at all"
        notes.append(f"the adapter changes these outputs {by}: no loss of it would show in the comparison")
    if merged.head is not None and merged.classifies:
        notes.append(f"outputs: logits of {len(merged.head)} classes; the linear head is in it, with a bias of 0")
        if path.suffix == ".pt":
            notes.append("class names: a .pt file has no place for them; a .safetensors file has, in its metadata")
    elif merged.head is not None:
        features = "F.normalize(model.encode_image(images), dim=-1)" if is_clip else "model(images)"
        if library.name == "tiny" and merged.templates:
            notes.append("prompts: open_clip has no tokenizer for this model; the head has the class embeddings")
        source = f"the head, which contains the scale, and the class names of {head_file(path)}"
        notes.append(f"logits: {features} @ head.T, with {source}")
    if merged.head is not None and merged.several:
        notes.append("probabilities: the sigmoid of each logit, since an image may have several classes")
    return Written(sizes, absolute, [*library.lines(path), *transform], notes)


def _bytes(state: base_model.State, metadata: dict[str, str], suffix: str = SUFFIXES[0]) -> bytes:
    if suffix != SUFFIXES[0]:
        stream = io.BytesIO()
        torch.save(state, stream)
        return stream.getvalue()
    seen: set[int] = set()
    for name, tensor in state.items():  # safetensors refuses shared memory
        if tensor.data_ptr() in seen:
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return save(state, metadata)


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
    file.adapter.require_matrix("the merge", file.path)
    refuse_inputs([output], [file.path])
    if output.exists() and not (overwrite and (output / "config.json").is_file()):
        raise UserError(f"{output} exists. Set another --output, or --overwrite to replace a model's folder.")
    task = plain_task(file, dequantized=True, gradient_checkpointing=False)
    model: Any = task.build()
    task.load_head(file.extra)
    whole_model = task.completed(model)
    plain = base_model.logits(whole_model)
    before = {name: value.clone() for name, value in model.state_dict().items()} if scale != 1 else {}
    save_load.place_adapter(model, file)
    whole_model.eval()  # new updates are in training mode; dropout would change the outputs
    expected = base_model.logits(whole_model)
    merge_and_unload(model)
    if before:
        model.load_state_dict(
            {name: base_model.interpolate(before[name], value, scale) for name, value in model.state_dict().items()}
        )
        expected = base_model.logits(whole_model)
    import transformers

    with disk_errors(output), atomic_folder(output) as part:
        whole_model.save_pretrained(part)
        task.vocabulary.save_pretrained(part)
        actual = base_model.logits(getattr(transformers, task.auto).from_pretrained(part, dtype=model.dtype).eval())
        absolute = base_model.check_written(actual, expected, plain, "logits of the merged model")
        size = disk_size(part)
    return task.auto, size, absolute

"""Names of base models: known ones, as rows for the `models` command, and models in a folder or a repository.

Any other name of open_clip or timm works, too. Parameter counts are for the whole base model (both towers of a CLIP
model, no classifier for timm) and are compared with the built models in the tests. Names of models that are read
without running code are ``local-dir:PATH`` and ``hf-hub:ORG/NAME``. Imports nothing heavy.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from randlora_pl.utils.errors import UserError, first_line, near
from randlora_pl.utils.files import parse_json
from randlora_pl.utils.options import misfit
from randlora_pl.utils.weights_files import LOCAL, hub_file, looks_like_file, remember

_CLIP_LICENSE = "OpenAI, LAION, DataComp: MIT; MetaCLIP: CC-BY-NC-4.0; DFN: Apple's own"
_APACHE = "Apache-2.0"
_DINOV3_LICENSE = "DINOv3-license"


@dataclass(frozen=True)
class ModelRow:
    """Base model in the catalog.

    Attributes:
        name: Value for ``--model.name``.
        library: ``"open_clip"`` or ``"timm"``.
        tags: Some values for ``--model.pretrained``, the paper's first; ``random`` and files always work.
        config: Bundled configuration that uses it, or an empty string.
        parameters: Parameters of the base model.
        image_size: Height and width in pixels.
        license: License of the weights as stated by their publishers, whose page is authoritative.
    """

    name: str
    library: str
    tags: tuple[str, ...]
    config: str
    parameters: int
    image_size: int
    license: str


MODELS: tuple[ModelRow, ...] = (
    ModelRow("tiny", "open_clip", ("emoji-fashion",), "quickstart", 4_070_913, 32, "see its MODEL_CARD.md"),
    ModelRow("ViT-B-32", "open_clip", ("openai", "laion2b_s34b_b79k", "datacomp_xl_s13b_b90k", "metaclip_fullcc"),
             "clip_vitb32", 151_277_313, 224, _CLIP_LICENSE),
    ModelRow("ViT-B-16", "open_clip", ("openai", "laion2b_s34b_b88k", "datacomp_xl_s13b_b90k", "dfn2b"),
             "", 149_620_737, 224, _CLIP_LICENSE),
    ModelRow("ViT-L-14", "open_clip", ("openai", "laion2b_s32b_b82k", "datacomp_xl_s13b_b90k", "dfn2b"),
             "clip_vitl14", 427_616_513, 224, _CLIP_LICENSE),
    ModelRow("ViT-L-14-336", "open_clip", ("openai",), "", 427_944_193, 336, _CLIP_LICENSE),
    ModelRow("ViT-H-14", "open_clip", ("laion2b_s32b_b79k", "metaclip_fullcc", "dfn5b"),
             "clip_vith14", 986_109_441, 224, _CLIP_LICENSE),
    ModelRow("ViT-B-16-SigLIP2", "open_clip", ("webli",), "siglip2_vitb16", 375_187_970, 224, _APACHE),
    ModelRow("PE-Core-B-16", "open_clip", ("meta",), "pe_core_vitb16", 447_660_545, 224, _APACHE),
    ModelRow("ViT-H-14-worldwide-quickgelu", "open_clip", ("metaclip2_worldwide",), "metaclip2_vith14",
             1_858_783_745, 224, "CC-BY-NC-4.0"),
    ModelRow("MobileCLIP2-S2", "open_clip", ("dfndr2b",), "mobileclip2_s2", 99_243_329, 256, "apple-amlr"),
    ModelRow("vit_small_patch14_dinov2", "timm", ("lvd142m",), "", 21_628_800, 224, _APACHE),
    ModelRow("vit_base_patch14_dinov2", "timm", ("lvd142m",), "dinov2_vitb14", 85_724_928, 224, _APACHE),
    ModelRow("vit_large_patch14_dinov2", "timm", ("lvd142m",), "", 303_227_904, 224, _APACHE),
    ModelRow("vit_small_patch16_dinov3", "timm", ("lvd1689m",), "dinov3_vits16", 21_586_944, 256, _DINOV3_LICENSE),
    ModelRow("vit_base_patch16_dinov3", "timm", ("lvd1689m",), "dinov3_vitb16", 85_641_216, 256, _DINOV3_LICENSE),
    ModelRow("vit_tiny_patch16_224", "timm", ("augreg_in21k",), "", 5_524_416, 224, _APACHE),
    ModelRow("vit_small_patch16_224", "timm", ("augreg_in21k", "dino"), "", 21_665_664, 224, _APACHE),
    ModelRow("vit_base_patch16_224", "timm", ("augreg_in21k", "dino"), "", 85_798_656, 224, _APACHE),
)  # fmt: skip
"""The tested base models, in the order of the listing."""

TINY_TAG = "emoji-fashion"
"""The bundled weights of the tiny CLIP."""

MATRIX = Path(__file__).with_name("matrix.csv")
"""Table of every architecture of open_clip and timm, written by ``scripts/model_matrix.py``."""


def matrix() -> list[dict[str, str]]:
    """Return the rows of the table of all architectures.

    Its columns: ``library``, ``name``; ``linear`` and ``convolutions``, adapted by default of all; the adapted share of
    the weights of the blocks in percent for ``RandLoRA``, ``LoRA`` and ``DoRA``; the largest ``frozen`` weights with
    their share; what needs the ``hub`` and so was not checked; why the model is ``refused``; the number of pretrained
    ``tags``, of them ``equal`` to the library's preprocessing, and how the others are ``different``.
    """
    with MATRIX.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


HUB = "hf-hub:"
OWN = "own"
"""Value of ``pretrained`` for the weights next to the configuration; None is the same."""

Library = Literal["open_clip", "timm"]
_CONFIGS: dict[Library, str] = {"open_clip": "open_clip_config.json", "timm": "config.json"}
_WEIGHTS: dict[Library, tuple[str, ...]] = {
    "open_clip": ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model"),
    "timm": ("model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model"),
}
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")

_LARGEST = {"image_size": 8192, "patch_size": 8192, "layers": 1024, "depth": 1024, "depths": 1024}
"""Bounds of the sizes in a configuration, far above all published models."""


class _Tower(TypedDict, total=False):
    """Values of a tower's configuration that are used before open_clip builds it; further keys are allowed."""

    image_size: int | list[int]
    patch_size: int
    layers: int | list[int]
    tokenizer_kwargs: dict[str, Any]


@dataclass(frozen=True)
class ModelFolder:
    """Model in a folder or a repository of the Hub.

    Attributes:
        name: ``local-dir:`` with an absolute path, or ``hf-hub:ORG/NAME``, with ``@REVISION`` for timm.
        library: Library that the configuration belongs to.
        file: The configuration file, on this machine.
        config: Its content.
    """

    name: str
    library: Library
    file: Path
    config: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    @property
    def revision(self) -> str | None:
        """Revision in the name of a repository."""
        return _repository(self.name)[1] if self.name.startswith(HUB) else None

    @property
    def stored_name(self) -> str:
        """Name for adapter files, without a local path."""
        return self.name if self.name.startswith(HUB) else LOCAL + self.file.parent.name

    @property
    def local_name(self) -> str:
        """Name by which the library finds the configuration on this machine."""
        return LOCAL + str(self.file.parent)

    @property
    def sha256(self) -> str:
        """SHA-256 of the configuration file, by which the folder is found again."""
        return remember(self.file)

    def weights(self) -> Path:
        """Return the weights file, downloaded if it is at the Hub and not in the cache; of the configuration's commit.

        Raises:
            UserError: There is none, or it cannot be downloaded.
        """
        if self.name.startswith(HUB):
            repository, commit = _repository(self.name)[0], self.file.parent.name
            files = (hub_file(repository, name, commit, "--model.name") for name in self._candidates())
        else:
            names = [
                *self._candidates(),
                *(file.name for suffix in _SUFFIXES for file in sorted(self.file.parent.glob(f"*{suffix}"))),
            ]
            files = (self.file.parent / name for name in names if (self.file.parent / name).is_file())
        path = next((each for each in files if each is not None), None)
        if path is None:
            raise UserError(
                f"--model.name: {self.name} has {self.file.name} but no weights ({', '.join(self._candidates()[:3])} "
                "...). Add the file, or pass --model.pretrained PATH or random."
            )
        return path

    def timm_parts(self) -> tuple[Any, str, dict[str, Any]]:
        """Return timm's configuration of the weights, the architecture and its arguments."""
        from timm.models import resolve_pretrained_cfg
        from timm.models._hub import load_model_config_from_path

        try:
            config, architecture, arguments = load_model_config_from_path(self.file.parent)
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # timm checks no type
            what = f"--model.name: {self.name}, {self.file.name} is damaged ({first_line(error)})"
            raise UserError(f"{what}. Copy it again.") from error
        return resolve_pretrained_cfg(architecture, pretrained_cfg=config), architecture, arguments

    def file_of(self, pretrained: str) -> str:
        """Return the absolute path of a weights file that the user gave in place of the folder's own weights.

        Raises:
            UserError: The value is not a path.
        """
        if not looks_like_file(pretrained):
            raise UserError(
                f"--model.pretrained: {self.name} has no weights '{pretrained}'. Remove the option for its own "
                "weights; a file or 'random' also work."
            )
        return str(Path(pretrained).expanduser().absolute())

    def _candidates(self) -> list[str]:
        return [f"{stem}{suffix}" for stem in _WEIGHTS[self.library] for suffix in _SUFFIXES[:3]]


def is_folder(name: str) -> bool:
    """Return True for a name of a folder or a repository of the Hub (also with timm's older ``hf_hub:``)."""
    return name.partition(":")[0].lower() in ("hf-hub", "hf_hub", "local-dir")


def open_folder(name: str, library: Library | None = None) -> ModelFolder:
    """Read and check the configuration of a model in a folder or at the Hub.

    Args:
        name: A name for which `is_folder` returns True.
        library: Library that must load it; None: the library whose configuration is there, open_clip's first.

    Raises:
        UserError: Folder, repository or configuration is missing, damaged, or needs code of its own.
    """
    prefix, _, place = name.partition(":")
    local = prefix.lower() == "local-dir"
    name = LOCAL + str(Path(place).expanduser().absolute()) if local else HUB + place
    if not place:
        raise UserError(f"--model.name: {prefix}: is followed by nothing. Use local-dir:PATH or hf-hub:ORG/NAME.")
    if local and not Path(place).expanduser().is_dir():
        raise UserError(f"--model.name: {place} is not a folder. Pass local-dir:PATH of a folder with a model.")
    wanted: list[Library] = ["open_clip", "timm"] if library is None else [library]
    for each in wanted:
        if local:
            file: Path | None = Path(name.removeprefix(LOCAL)) / _CONFIGS[each]
        else:
            repository, revision = _repository(name)
            file = hub_file(repository, _CONFIGS[each], revision, "--model.name")
        if file is None or not file.is_file():
            continue
        try:
            config = parse_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--model.name: {file} is damaged ({first_line(error)}). Copy it again.") from error
        if not isinstance(config, dict):
            raise UserError(f"--model.name: {file} is not a configuration of a model. Copy it again.")
        check = _check_clip if each == "open_clip" else _check_timm
        for wrong in check(config):
            raise UserError(f"--model.name: {name}, {file.name}: {wrong}")
        return ModelFolder(name, each, file, config)
    files = " or ".join(f"{_CONFIGS[each]} of {each}" for each in wanted)
    raise UserError(f"--model.name: {name} has no {files}. Check the name, or copy the missing file.")


def check_config(base: Mapping[str, Any], here: str | None, source: object) -> None:
    """Raise an error if the configuration of a base model changed at the Hub after an adapter was saved.

    Args:
        base: ``base_model`` of ``adapter_config.json``.
        here: ``config_sha256`` of the model that was built.
        source: Path of the adapter, for the message.

    Raises:
        UserError: It changed.
    """
    there = base.get("config_sha256")
    if there and here and there != here:
        raise UserError(
            f"{source}: the configuration of its base model {base.get('name')} is another one now ({there[:12]}... "
            f"then, {here[:12]}... now), so outputs would differ. Train again, or restore the earlier configuration."
        )


def _repository(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.removeprefix(HUB).partition("@")
    return repository, revision or None


def _check_clip(config: Mapping[str, Any]) -> Iterator[str]:
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not isinstance(model.get("embed_dim"), int):
        yield "model_cfg with embed_dim is missing. Copy the file again."
    elif not all(isinstance(model.get(part), dict) for part in ("vision_cfg", "text_cfg")):
        yield "model_cfg needs vision_cfg and text_cfg. Copy the file again."
    elif not isinstance(config.get("preprocess_cfg", {}), dict):
        yield "preprocess_cfg is not a mapping. Copy the file again."
    else:
        for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
            if wrong := misfit(model.get(part) or {}, _Tower, part) or _size_out_of_range(model.get(part) or {}, part):
                yield f"{wrong}. Copy the file again."
        if "trust_remote_code" in model["text_cfg"].get("tokenizer_kwargs", {}):
            yield "its tokenizer needs code of the repository, which is never run. Choose another model."


def _size_out_of_range(values: Mapping[str, Any], part: str) -> str | None:
    """Return the first of the sizes in a configuration that no model has, or None."""
    for key, largest in _LARGEST.items():
        value = values.get(key, 1)
        sides = value if isinstance(value, list) else [value]
        if not sides or any(isinstance(side, int) and not 0 < side <= largest for side in sides):
            return f"{part}.{key} is {value}"
    return None


def _check_timm(config: Mapping[str, Any]) -> Iterator[str]:
    import timm

    loading = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
    architecture, options = config.get("architecture"), config.get("model_args", {})
    names = timm.list_models()
    if not isinstance(architecture, str):
        yield "architecture is missing, so it is not a model of timm. Copy the file again."
    elif architecture not in names:
        yield f"timm has no architecture {architecture!r}.{near(architecture, names)} Choose another model."
    elif not isinstance(options, dict) or not isinstance(config.get("pretrained_cfg", {}), dict):
        yield "model_args or pretrained_cfg is not a mapping. Copy the file again."
    elif wrong := sorted(loading & options.keys()):
        yield f"model_args sets {wrong[0]}, which would load other weights. Remove it from the file."
    elif odd := _size_out_of_range(options, "model_args"):
        yield f"{odd}. Copy the file again."
    elif options.get("in_chans", 3) != 3:
        yield f"its images have {options['in_chans']} channels; only 3 are supported. Choose another model."


def library_of(name: str) -> Literal["open_clip", "timm"]:
    """Return the library of a model name.

    The name is ``tiny``, one of open_clip or timm (also with a tag after a dot), ``local-dir:PATH`` or
    ``hf-hub:ORG/NAME``.

    Raises:
        UserError: The name is in neither library.
    """
    if is_folder(name):
        return open_folder(name).library
    import open_clip
    import timm

    clips = ["tiny", *open_clip.list_models()]
    if name in clips or name.replace("/", "-") in clips:
        return "open_clip"
    base = name.partition(".")[0]
    vits = timm.list_models()
    if base in vits:
        return "timm"
    raise UserError(
        f"--model.name: neither open_clip nor timm has a model '{name}'.{near(base, [*clips, *vits])} "
        "`randlora-pl models` shows some."
    )

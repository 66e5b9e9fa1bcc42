"""Text embeddings of class prompts, which form a frozen classification head, and zero-shot accuracy."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from randlora_pl.models.weights import ModelIdentity, evaluating
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files import write_bytes
from randlora_pl.utils.machine import cache_folder

_log = logging.getLogger("randlora_pl")
_FORMAT = "1"  # increase when the computation changes, so that old files are ignored
Tokenizer = Callable[[list[str]], Tensor]


def class_prompts(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Fill every template (with ``{}`` for the name) with every class name, class by class.

    Examples:
        >>> class_prompts(["cat", "dog"], ["a photo of a {}."])
        ['a photo of a cat.', 'a photo of a dog.']

    Raises:
        UserError: No class, no template, or a template without ``{}``.
    """
    if not classnames or not templates:
        raise UserError("Class prompts need at least one class name and one template such as 'a photo of a {}.'.")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"The template '{template}' has no {{}} for the class name, e.g. 'a photo of a {{}}.'.")
    return [template.replace("{}", name) for name in classnames for template in templates]


def check_distinct(tokenizer: Tokenizer, classnames: Sequence[str], templates: Sequence[str]) -> None:
    """Refuse prompts that are cut so early that two classes get the same tokens, in the longest of the templates.

    Raises:
        UserError: Names two of these classes.
    """
    longest = max(templates, key=len)
    tokens = tokenizer(class_prompts(classnames, [longest]))
    known: dict[bytes, str] = {}
    for name, row in zip(classnames, tokens.cpu().numpy(), strict=True):
        other = known.setdefault(row.tobytes(), name)
        if _letters(other) != _letters(name):  # else the tokenizer takes them for one name
            raise UserError(
                f"The classes {brief(other)} and {brief(name)} have the same prompt: the text tower reads "
                f"{tokens.shape[1]} tokens of {brief(longest)}. Shorten the prompts or the class names."
            )


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def encode_prompts(
    model: nn.Module,
    tokenizer: Tokenizer,
    classnames: Sequence[str],
    templates: Sequence[str],
    device: torch.device | str,
    batch: int = 256,
) -> Tensor:
    """Embed classes by their prompts: normalize each embedding, average over the templates, normalize again.

    The paper's vision-only protocol (section 5.2) and CLIP's prompt ensembling. Runs in eval mode, without gradients,
    and without autocast unless weights are bfloat16; the modules' modes are restored.

    Args:
        model: Model with ``encode_text``, on ``device``.
        tokenizer: Function from n strings to an int64 tensor (n, context length).
        classnames: C names.
        templates: T texts with ``{}`` for the name.
        device: Device of the model and of the result.
        batch: Prompts per forward pass.

    Returns:
        (C, embed_dim) in float32 on ``device``, rows of unit length.

    Raises:
        UserError: See `class_prompts` and `check_distinct`.
    """
    prompts = class_prompts(classnames, templates)
    check_distinct(tokenizer, classnames, templates)
    device = torch.device(device)
    encode: Callable[[Tensor], Tensor] = model.encode_text  # type: ignore[assignment]
    parts = []
    rounded = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())  # products cannot mix dtypes
    with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=rounded):
        for start in range(0, len(prompts), batch):
            tokens = tokenizer(prompts[start : start + batch]).to(device)
            parts.append(F.normalize(encode(tokens).float(), dim=-1))
        mean = torch.cat(parts).reshape(len(classnames), len(templates), -1).mean(dim=1)
        return F.normalize(mean, dim=-1)


def cached_text_head(
    model: nn.Module,
    tokenizer: Tokenizer,
    classnames: Sequence[str],
    templates: Sequence[str],
    device: torch.device | str,
    identity: ModelIdentity,
) -> Tensor:
    """Return the result of `encode_prompts`, cached on disk.

    The key is the SHA-256 of the model's name, the bytes of every text weight, and the prompts. The file also stores a
    digest of its content; a damaged file is computed again. The folder is ``$RANDLORA_PL_CACHE``, or the system's user
    cache folder.

    Examples:
        >>> clip = load_clip("tiny")
        >>> templates = ["a photo of a {}."]
        >>> head = cached_text_head(clip.model, clip.tokenizer, ["cat", "dog"], templates, "cpu", clip.identity)
        >>> head.shape
        torch.Size([2, 128])
    """
    prompts = class_prompts(classnames, templates)
    first = tokenizer(prompts[:1]).tolist()  # changes with the tokenizer and the context length
    facts = [_FORMAT, identity.library, identity.name, prompts, len(classnames), first]
    digest = hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("visual."):
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
    key = digest.hexdigest()
    path = cache_folder() / "text_heads" / f"{key}.safetensors"
    head = _read(path, key, len(classnames))
    if head is None:
        head = encode_prompts(model, tokenizer, classnames, templates, device)
        stored = head.cpu().contiguous()
        meta = {"key": key, "sha256": hashlib.sha256(_bytes(stored)).hexdigest()}
        try:
            write_bytes(path, save({"head": stored}, metadata=meta))
        except OSError as error:  # the cache is optional, so a full or read-only disk must not stop the run
            _log.warning("The text head cannot be cached in %s (%s).", path.parent, error)
    return head.to(device)


def _bytes(tensor: Tensor) -> Any:
    """Return the tensor's memory as a NumPy array of bytes, without a copy on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _read(path: Path, key: str, classes: int) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            head: Tensor = file.get_tensor("head")
            meta = file.metadata() or {}
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        head, meta = torch.empty(0), {}
    good = head.dtype == torch.float32 and head.ndim == 2 and len(head) == classes
    if good and meta.get("key") == key and meta.get("sha256") == hashlib.sha256(_bytes(head)).hexdigest():
        return head
    _log.warning("The cached text head %s is damaged and is computed again.", path)
    return None


@torch.inference_mode()
def zero_shot_accuracy(
    model: Any, heads: Tensor, batches: Iterable[tuple[Tensor, Tensor]], tick: Callable[[int], None] = lambda _: None
) -> tuple[list[float], int]:
    """Return the zero-shot accuracy in percent of each head, and the number of images.

    Args:
        model: Model with ``encode_image``.
        heads: Embeddings of the classes (heads, C, e), of unit length.
        batches: Images (b, 3, H, W) with labels (b,).
        tick: Receives the number of images of each batch.
    """
    right, count = torch.zeros(len(heads), dtype=torch.int64), 0
    for images, labels in batches:
        features = F.normalize(model.encode_image(images).float(), dim=-1)
        right += ((features @ heads.transpose(1, 2)).argmax(2) == labels).sum(1).cpu()
        count += len(labels)
        tick(len(labels))
    return [100 * number / max(1, count) for number in right.tolist()], count

"""Texts of CLIP: embeddings of class prompts, which form a frozen head, and learned tokens in both towers."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from randlora_pl.models.weights import ModelIdentity, evaluating
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files import write_bytes
from randlora_pl.utils.machine import cache_folder

_log = logging.getLogger("randlora_pl")
_FORMAT = "1"  # increase when the computation changes, so that old files are ignored
Tokenizer = Callable[..., Tensor]


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
            parts.append(nn.functional.normalize(encode(tokens).float(), dim=-1))
        mean = torch.cat(parts).reshape(len(classnames), len(templates), -1).mean(dim=1)
        return nn.functional.normalize(mean, dim=-1)


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
        features = nn.functional.normalize(model.encode_image(images).float(), dim=-1)
        right += ((features @ heads.transpose(1, 2)).argmax(2) == labels).sum(1).cpu()
        count += len(labels)
        tick(len(labels))
    return [100 * number / max(1, count) for number in right.tolist()], count


Position = Literal["end", "middle", "front"]
"""Place of a class name: after the learned tokens, between their halves, or before them."""


class TextRows(nn.Module):
    """Token rows of C texts, sorted by length and divided into chunks of about equal work.

    A causal tower gives a text's feature at its end token, which sees nothing after it. So each chunk is cut to its
    longest text, and results equal the ones of full rows.

    Args:
        ids: (C, L) int64, filled up with 0; words or any id under a slot.
        slots: (C, L) int64: the learned token that takes a place, or -1 for a word.
        ends: (C,) int64: position of the end token.
        chunk_tokens: Tokens of a chunk, at most; a text of more is a chunk of its own.

    Attributes:
        order: (C,) row of each text in the given order, by place in the sorted one.
        inverse: (C,) place in the sorted order of each given text.
        chunks: Start, stop and length of each chunk in the sorted order.
    """

    ids: Tensor
    slots: Tensor
    ends: Tensor
    order: Tensor
    inverse: Tensor

    def __init__(self, ids: Tensor, slots: Tensor, ends: Tensor, chunk_tokens: int = 4096) -> None:
        super().__init__()
        order = ends.argsort(stable=True)
        sorted_rows = {"ids": ids[order], "slots": slots[order], "ends": ends[order]}
        for name, value in {**sorted_rows, "order": order, "inverse": order.argsort()}.items():
            self.register_buffer(name, value, persistent=False)
        lengths, start = (ends[order] + 1).tolist(), 0
        self.chunks: list[tuple[int, int, int]] = []
        for stop in range(1, len(lengths) + 1):
            if stop == len(lengths) or (stop + 1 - start) * lengths[stop] > chunk_tokens:
                self.chunks.append((start, stop, lengths[stop - 1]))
                start = stop

    def __len__(self) -> int:
        return len(self.ids)


def word_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a text, with start and end token, not cut."""
    row = tokenizer([text], context_length=1024)[0]  # a row is checked against the tower's own length
    return row[: int(row.argmax()) + 1].tolist()  # CLIP's end token has the largest id


def padded(
    rows: list[list[int]], slots: list[list[int]], names: Sequence[str], room: int, chunk_tokens: int
) -> TextRows:
    """Return rows of one length from token ids of the texts of classes, with ``slots`` as of `TextRows`.

    Raises:
        UserError: A text is longer than ``room``, the positions of the text tower.
    """
    long = max(range(len(rows)), key=lambda number: len(rows[number]))
    if len(rows[long]) > room:
        raise UserError(
            f"the prompt of class {names[long]!r} has {len(rows[long])} tokens, the text tower has room for {room}. "
            "Use a shorter context (--model.prompts.length) or a shorter name."
        )
    width = len(rows[long])

    def filled(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([each + [value] * (width - len(each)) for each in lists])

    ends = torch.tensor([len(row) - 1 for row in rows])
    return TextRows(filled(rows, 0), filled(slots, -1), ends, chunk_tokens)


def _run_blocks(
    blocks: Iterable[nn.Module], x: Tensor, deep: Sequence[Tensor], first: int, *, recompute: bool, **options: Any
) -> Tensor:
    """Return the states (n, L, d) after all blocks of a transformer, from the states before the first, ``x``.

    Before block i + 1, ``deep[i]`` (m, d) replaces the m states from ``first`` on, or the last m if it is negative.
    Nothing is written into ``x``, which the backward pass may need. With ``recompute`` the backward pass computes each
    block again instead of keeping its activations.
    """
    recompute = recompute and torch.is_grad_enabled()
    for number, block in enumerate(blocks):
        if 0 < number <= len(deep):
            tokens = deep[number - 1]
            start = x.shape[1] - len(tokens) if first < 0 else first
            x = torch.cat([x[:, :start], copies(tokens, x), x[:, start + len(tokens) :]], dim=1)
        x = checkpoint(block, x, use_reentrant=False, **options) if recompute else block(x, **options)
    return x


def copies(tokens: Tensor, x: Tensor) -> Tensor:
    """Return tokens (m, d) for each row of states (n, L, d), cast last: gradients add up in float32."""
    return tokens.expand(x.shape[0], -1, -1).to(x.dtype)  # len() would fix the batch size of an exported program


def text_tower(model: nn.Module) -> Any:
    """Return the module with the parts of a CLIP model's text tower: the model itself, or its ``text``.

    Raises:
        UserError: The tower does not suit learned tokens (see `is_causal`).
    """
    tower, unfit = _tower(model)
    if unfit:
        raise UserError(
            f"learned prompts need CLIP's causal text tower and tokenizer, such as ViT-B-32's; this {unfit}. "
            "Use --model.prompts Fixed with an adapter."
        )
    return tower


def is_causal(model: nn.Module) -> bool:
    """Return True if no position of the text tower sees a later one, and its feature is read at CLIP's end token."""
    return not _tower(model)[1]


def _tower(model: nn.Module) -> tuple[Any, str]:
    """Return the text tower, and why it does not suit learned tokens, empty if it does."""
    tower: Any = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
    unfit = ""
    if not hasattr(tower, "token_embedding") or not hasattr(tower, "transformer"):
        unfit = f"one is {type(tower).__name__}"
    elif getattr(tower, "attn_mask", None) is None:
        unfit = "tower's words see later words"
    elif getattr(tower, "cls_emb", None) is not None:
        unfit = "tower ends with a class token"
    elif pool != "argmax" or tower.text_projection is None:  # the token with the largest id
        unfit = f"tower is read otherwise (pool type {pool})"
    return tower, unfit


def embed_dim(model: nn.Module) -> int:
    """Return the width e of the features of a model with a causal text tower."""
    projection: Any = text_tower(model).text_projection
    return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])


def token_embeddings(tower: Any, ids: Tensor, slots: Tensor, context: Tensor | None) -> Tensor:
    """Return the embeddings (C, L, d) in float32 of token rows, with learned tokens in their slots.

    Args:
        tower: See `text_tower`.
        ids: (C, L) token ids.
        slots: (C, L) numbers of learned tokens, -1 for words.
        context: (M, d) learned tokens of all texts, (C, M, d) of each text, or None if no slot is taken. The copies
            are made in float32, so that C gradients add up in float32, too.
    """
    words: Tensor = tower.token_embedding(ids).float()
    if context is None:
        return words
    taken = slots.clamp(min=0)
    if context.dim() == 2:
        learned = context[taken]
    else:
        learned = context.gather(1, taken[..., None].expand(-1, -1, context.shape[-1]))
    return torch.where((slots >= 0)[..., None], learned, words)


def text_features(
    tower: Any, ids: Tensor, slots: Tensor, ends: Tensor, context: Tensor | None = None, deep: Sequence[Tensor] = ()
) -> Tensor:
    """Return the features (C, e) of texts, not normalized; L may be less than the tower's length.

    ``ends`` (C,) are the positions of the end tokens. Before block i + 1, ``deep[i]`` (n, d) replaces the states at
    positions 1 to n. For the other arguments see `token_embeddings`.
    """
    embedded = token_embeddings(tower, ids, slots, context)
    length, dtype = embedded.shape[1], tower.transformer.get_cast_dtype()
    x = embedded.to(dtype) + tower.positional_embedding[:length].to(dtype)
    again, mask = tower.transformer.grad_checkpointing, tower.attn_mask[:length, :length]
    x = _run_blocks(tower.transformer.resblocks, x, deep, 1, recompute=again, attn_mask=mask)
    x = tower.ln_final(x[torch.arange(len(x), device=x.device), ends])
    projection = tower.text_projection
    features: Tensor = projection(x) if isinstance(projection, nn.Module) else x @ projection
    return features


def encode_rows(
    tower: Any, rows: TextRows, context: Tensor | None = None, deep: Sequence[Tensor] = (), again: bool = False
) -> Tensor:
    """Return the features (C, e) of all texts, not normalized, chunk by chunk.

    If there are several chunks and gradients are needed, each chunk is computed again in the backward pass, so that the
    activations of one chunk are alive at a time; ``again`` does so with one chunk, too. For the other arguments see
    `token_embeddings` and `text_features`.
    """
    blockwise = tower.transformer.grad_checkpointing
    again = (again or len(rows.chunks) > 1) and torch.is_grad_enabled() and not blockwise
    run: Callable[..., Tensor] = partial(checkpoint, text_features, use_reentrant=False) if again else text_features
    if context is not None and context.dim() == 3:
        context = context[rows.order]
    parts = []
    for start, stop, length in rows.chunks:
        ids, slots, ends = rows.ids[start:stop, :length], rows.slots[start:stop, :length], rows.ends[start:stop]
        own = context[start:stop] if context is not None and context.dim() == 3 else context
        parts.append(run(tower, ids, slots, ends, own, list(deep)))
    return torch.cat(parts)[rows.inverse]


def image_blocks(visual: Any) -> list[nn.Module]:
    """Return the blocks of an image tower that learned tokens can pass through.

    Raises:
        UserError: The tower has rotary positions, or is not a vision transformer of open_clip or timm.
    """
    trunk: Any = getattr(visual, "trunk", None)
    if trunk is None and hasattr(visual, "_embeds") and hasattr(visual, "transformer"):
        return list(visual.transformer.resblocks)
    if type(trunk).__name__ == "VisionTransformer" and getattr(trunk, "rope", None) is None:
        return list(trunk.blocks)
    name = type(visual if trunk is None else trunk).__name__
    raise UserError(
        f"visual prompts need a vision transformer, such as ViT-B-32's; the image tower is {name}. Prompts of the text "
        "tower work (--model.prompts CoOp, or vision_length 0)."
    )


def image_width(visual: Any) -> int:
    """Return the width of the image tower's states, in which its learned tokens are."""
    image_blocks(visual)
    trunk = getattr(visual, "trunk", None)
    return int(visual.conv1.out_channels if trunk is None else trunk.embed_dim)


def image_features(visual: Any, images: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
    """Return the features (B, e) of images, not normalized.

    Args:
        visual: The image tower of a CLIP model.
        images: (B, 3, H, W).
        prompts: ``prompts[0]`` (n, d) follows the patches, after their positions; ``prompts[i]`` replaces it before
            block i. The last ones stay to the end of the tower, and are cut before the pooling.
    """
    if not prompts:
        output = visual(images)
        plain: Tensor = output[0] if isinstance(output, tuple) else output  # CoCa also returns its tokens
        return plain
    features: Tensor
    if hasattr(visual, "trunk"):  # timm's
        trunk = visual.trunk
        x = trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images)))
        x = trunk.norm_pre(torch.cat([x, copies(prompts[0], x)], dim=1))
        x = _run_blocks(trunk.blocks, x, prompts[1:], -1, recompute=trunk.grad_checkpointing)
        features = visual.head(trunk.forward_head(trunk.norm(x[:, : x.shape[1] - len(prompts[0])])))
        return features
    x = visual._embeds(images)
    x = torch.cat([x, copies(visual.ln_pre(prompts[0]), x)], dim=1)
    tower = visual.transformer
    x = _run_blocks(tower.resblocks, x, prompts[1:], -1, recompute=tower.grad_checkpointing)
    pooled, _ = visual._pool(x[:, : x.shape[1] - len(prompts[0])])
    features = pooled if visual.proj is None else pooled @ visual.proj
    return features

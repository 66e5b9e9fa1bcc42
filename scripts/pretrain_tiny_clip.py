"""Train the shipped tiny CLIP from scratch on emoji and on half of the Fashion-MNIST classes: no digits.

    python scripts/pretrain_tiny_clip.py --emoji PACKAGE --fashion FOLDER --output model.safetensors

PACKAGE is npm's `emoji-datasource-google`, unpacked (`emoji.json`, `img/google/64/*.png`). FOLDER holds the four
`*-ubyte.gz` files of Fashion-MNIST, as Debian's package `dataset-fashion-mnist` installs them. The model card beside
the weights (`src/randlora_pl/models/tiny/MODEL_CARD.md`) has the commands that fetch both, and the figures.
"""

import argparse
import gzip
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from randlora_pl.models.clip import build_tiny, tiny_tokenizer

SEEN = {0: "t-shirt", 1: "trouser", 2: "pullover", 3: "dress", 4: "coat"}
UNSEEN = {5: "sandal", 6: "shirt", 7: "sneaker", 8: "bag", 9: "ankle boot"}
TEMPLATES = ["{}", "a photo of a {}", "an image of {}", "a picture of the {}", "a drawing of {}", "an emoji of {}"]
HELD_OUT_TONE = "1F3FD"  # the medium skin tone: never trained on, used to measure retrieval
# Whatever shows a digit or a clock face, found by name and on a contact sheet of the whole set.
WITHOUT = re.compile(
    r"KEYCAP|HASH KEY|CLOCK FACE|CLOCK$|WATCH|CALENDAR|HUNDRED|FOR NUMBERS|CIRCLED ONE|EIGHTEEN|MODIFIER"
)
WITHOUT_SHORT = {
    "pager", "convenience_store", "slot_machine", "8ball", "game_die", "school",
    "first_place_medal", "second_place_medal", "third_place_medal",
}  # fmt: skip
CANVAS = 64  # images wait at this size, as (foreground colour, opacity)


def read_emoji(folder: Path) -> tuple[Tensor, list[list[str]], Tensor, Tensor]:
    """Emoji images uint8 (n, 4, 64, 64), the names of each concept, the concept of each image, the held-out mask."""
    images, names, concepts, held_out = [], [], [], []
    for entry in sorted(json.loads((folder / "emoji.json").read_text(encoding="utf-8")), key=lambda e: e["unified"]):
        if not entry["has_img_google"] or WITHOUT.search(entry["name"] or "") or entry["short_name"] in WITHOUT_SHORT:
            continue
        variants = entry.get("skin_variations", {})
        for code, row in [("", entry), *sorted(variants.items())]:
            path = folder / "img" / "google" / "64" / row["image"]
            if not path.exists():
                continue
            with Image.open(path) as picture:
                square = picture.convert("RGBA").resize((CANVAS, CANVAS))
            images.append(torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1))
            concepts.append(len(names))
            held_out.append(HELD_OUT_TONE in code)
        short = [re.sub(r"[-_]", " ", name) for name in entry["short_names"] if not re.search(r"\d", name)]
        names.append([(entry["name"] or entry["short_name"]).lower(), *short])
    return torch.stack(images), names, torch.tensor(concepts), torch.tensor(held_out)


def read_fashion(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 28, 28) and labels of one split ("train" or "t10k") from the idx files."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64))


def as_canvas(grey: Tensor) -> Tensor:
    """Light-on-dark grey images (n, h, w) as white of that opacity: (n, 4, 64, 64) in [0, 1]."""
    opacity = F.interpolate(grey[:, None].float() / 255, size=CANVAS, mode="bilinear", align_corners=False)
    return torch.cat([torch.ones_like(opacity).expand(-1, 3, -1, -1), opacity], 1)


class Augmenter:
    """Random views (n, 3, 32, 32) in [-1, 1] of canvases (n, 4, 64, 64), from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, n: int, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *(shape or (1, 1, 1)), generator=self.generator) * (high - low) + low

    def chance(self, n: int, probability: float) -> Tensor:
        return self.uniform(n, 0, 1) < probability

    def warp(self, canvas: Tensor) -> Tensor:
        """Scale, stretch, turn, slant and shift each image; opacity is premultiplied so that edges stay clean."""
        n = len(canvas)
        angle, slant, shift_x, shift_y, zoom, stretch = (
            self.uniform(n, -bound, bound, 1)[:, 0] for bound in (0.2, 0.15, 0.12, 0.12, 0.25, 0.12)
        )
        cos, sin = angle.cos(), angle.sin()
        wide, high = (zoom + stretch).exp(), (zoom - stretch).exp()
        rows = torch.stack(
            [cos * wide, (slant * cos - sin) * wide, shift_x, sin * high, (slant * sin + cos) * high, shift_y]
        )
        grid = F.affine_grid(rows.T.reshape(n, 2, 3), [n, 4, CANVAS, CANVAS], align_corners=False)
        canvas = torch.cat([canvas[:, :3] * canvas[:, 3:], canvas[:, 3:]], 1)
        return F.avg_pool2d(F.grid_sample(canvas, grid, align_corners=False), 2)

    def strokes(self, image: Tensor) -> Tensor:
        """Outlines: the contrast within small windows of the image, light on dark, scaled to [0, 1]."""
        grey = image.mean(1, keepdim=True)
        edge = F.max_pool2d(grey, 3, 1, 1) + F.max_pool2d(-grey, 3, 1, 1)
        return (edge / edge.amax((2, 3), keepdim=True).clamp_min(0.1)).expand(-1, 3, -1, -1)

    def coarse(self, image: Tensor) -> Tensor:
        """The image seen through 8, 12 or 16 pixels a side."""
        size = (8, 12, 16)[int(torch.randint(3, (), generator=self.generator))]
        small = F.interpolate(image, size=size, mode="area")
        return F.interpolate(small, size=image.shape[-1], mode="bicubic", align_corners=False)

    def __call__(self, canvas: Tensor) -> Tensor:
        n = len(canvas)
        warped = self.warp(canvas)
        colour, opacity = warped[:, :3], warped[:, 3:]
        tint = torch.where(self.chance(n, 0.25), self.uniform(n, 0.2, 1.2, 3, 1, 1), 1.0)
        plain = (self.chance(n, 0.5)).float()  # black or white rather than coloured
        ground = plain * self.chance(n, 0.6).float() + (1 - plain) * self.uniform(n, 0, 1, 3, 1, 1)
        image = colour * tint + ground * (1 - opacity)
        image = torch.where(self.chance(n, 0.08), opacity, image)  # the silhouette
        image = torch.where(self.chance(n, 0.5), image.mean(1, keepdim=True), image)
        image = torch.where(self.chance(n, 0.2), self.strokes(image), image)
        image = torch.where(self.chance(n, 0.3), 1 - image, image)
        image = torch.where(self.chance(n, 0.35), self.coarse(image), image)
        image = (image - 0.5) * self.uniform(n, 0.6, 1.3) + 0.5 + self.uniform(n, -0.15, 0.15)
        image = image + torch.randn(image.shape, generator=self.generator) * self.uniform(n, 0, 0.03)
        return image.clamp(0, 1) * 2 - 1


def contrastive_loss(model: nn.Module, images: Tensor, tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric loss with one caption per concept; a caption's images share its text-to-image target."""
    logits = (
        model.logit_scale.exp()
        * model.encode_image(images, normalize=True)
        @ model.encode_text(tokens, normalize=True).T
    )
    members = F.one_hot(target, len(tokens)).float()
    to_image = -(members / members.sum(0) * logits.log_softmax(0)).sum(0).mean()
    return (F.cross_entropy(logits, target) + to_image) / 2, (logits.argmax(1) == target).float().mean()


@torch.no_grad()
def zero_shot(model: nn.Module, images: Tensor, captions: list[str], labels: Tensor) -> float:
    """Top-1 accuracy of images (n, 3, 32, 32) in [-1, 1] against one caption per class."""
    model.eval()
    text = model.encode_text(tiny_tokenizer()(captions), normalize=True)
    guess = torch.cat([(model.encode_image(part, normalize=True) @ text.T).argmax(1) for part in images.split(512)])
    return (guess == labels).float().mean().item()


def resized(grey: Tensor) -> Tensor:
    """Grey images (n, h, w) of 0 to 255 as the model takes them: bicubic to 32 x 32, three channels, [-1, 1]."""
    image = F.interpolate(grey[:, None].float(), size=32, mode="bicubic", align_corners=False).clamp(0, 255)
    return (image / 127.5 - 1).expand(-1, 3, -1, -1)


def zero_shot_digits(model: nn.Module) -> float:
    """Zero-shot accuracy on all 1,797 digits of scikit-learn, which the training never saw."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    images = resized(torch.from_numpy(digits.images) * (255 / 16))
    return zero_shot(model, images, [f"An image of {word}" for word in words], torch.from_numpy(digits.target))


def evaluate(
    model: nn.Module, emoji: tuple[Tensor, list[list[str]], Tensor, Tensor], fashion: Path
) -> dict[str, float]:
    """Zero-shot figures of the model card."""
    figures = {"digits": zero_shot_digits(model)}
    pixels, labels = read_fashion(fashion, "t10k")
    for name, classes in (("fashion_seen", SEEN), ("fashion_unseen", UNSEEN)):
        keep = torch.isin(labels, torch.tensor(list(classes)))
        captions = [f"a photo of a {word}" for word in classes.values()]
        figures[name] = zero_shot(model, resized(pixels[keep]), captions, labels[keep] - min(classes))
    canvas, names, concepts, held_out = emoji
    shown = canvas[held_out].float() / 255
    shown = F.avg_pool2d(shown[:, :3] * shown[:, 3:] + 1 - shown[:, 3:], 2) * 2 - 1  # on white
    figures["emoji_held_out_tone"] = zero_shot(model, shown, [row[0] for row in names], concepts[held_out])
    return figures


def train(args: argparse.Namespace) -> nn.Module:
    """The whole run; every random number comes from two seeded generators."""
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    emoji, names, concept_of, held_out = read_emoji(args.emoji)
    pixels, labels = read_fashion(args.fashion, "train")
    variants = [torch.nonzero((concept_of == c) & ~held_out)[:, 0].numpy() for c in range(len(names))]
    classes = {label: torch.nonzero(labels == label)[:, 0].numpy() for label in SEEN}
    worn_images = sum(len(members) for members in classes.values())
    print(f"{int((~held_out).sum())} emoji images of {len(names)} concepts, {worn_images} of Fashion-MNIST")

    model, tokenizer, augment = build_tiny("random", args.seed), tiny_tokenizer(), Augmenter(generator)
    model.train()
    # Muon for the matrices of the blocks (it needs far fewer steps than AdamW), AdamW for the rest.
    named = dict(model.named_parameters())
    blocks = [p for name, p in named.items() if p.ndim == 2 and "resblocks" in name]
    tables = [p for name, p in named.items() if p.ndim >= 2 and "resblocks" not in name]
    vectors = [p for p in named.values() if p.ndim < 2]
    groups = [{"params": tables, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = [
        torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98)),
        torch.optim.Muon(
            blocks, lr=2 * args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
    ]
    warmup = max(1, args.steps // 20)

    def factor(step: int) -> float:
        progress = max(0, step - warmup) / max(1, args.steps - warmup)
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    start = time.perf_counter()
    for step in range(args.steps):
        # Two views of each drawn emoji concept, and an eighth of the batch from Fashion-MNIST.
        from_fashion = args.batch // 8
        drawn = rng.permutation(len(names))[: (args.batch - from_fashion) // 2].repeat(2)
        canvas = emoji[[rng.choice(variants[c]) for c in drawn]].float() / 255
        worn = rng.integers(len(SEEN), size=from_fashion)
        canvas = torch.cat([canvas, as_canvas(pixels[[rng.choice(classes[int(label)]) for label in worn]])])
        # One caption per name: a name that both sources share (coat, dress) is one concept.
        keys = [names[c][0] for c in drawn] + [SEEN[int(label)] for label in worn]
        unique = {key: position for position, key in enumerate(dict.fromkeys(keys))}
        said = {names[c][0]: names[c] for c in drawn}
        captions = [str(rng.choice(TEMPLATES)).format(rng.choice(said.get(key, [key]))) for key in unique]
        images, target = augment(canvas), torch.tensor([unique[key] for key in keys])
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracy = contrastive_loss(model, images, tokenizer(captions), target)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % args.log_every == 0 or step == args.steps - 1:
            seconds = time.perf_counter() - start
            print(
                f"step {step:5d}  loss {loss.item():.3f}  accuracy {accuracy.item():.3f}  {seconds:.0f} s", flush=True
            )
    return model


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="unpacked npm package emoji-datasource-google")
    parser.add_argument("--fashion", type=Path, required=True, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--output", type=Path, required=True, help="where the weights go (.safetensors, fp16)")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=50)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    model = train(args).half()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_suffix(".partial")
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(args.output)
    figures = evaluate(model.float(), read_emoji(args.emoji), args.fashion)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()

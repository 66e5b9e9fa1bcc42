"""The shipped tiny CLIP: its file, its tokenizer, the figures of its model card, and the script that made it."""

import gzip
import json
import re
import struct
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from randlora_pl.models.catalog import TINY_TAG
from randlora_pl.models.clip import TINY_CONFIG, build_tiny, tiny_tokenizer
from tests.support.scripts import load_script

FILES = resources.files("randlora_pl.models") / "tiny"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("pretrain_tiny_clip")


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Give back what the script's `main` sets for its own process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def shipped() -> CLIP:
    model = build_tiny()
    assert isinstance(model, CLIP)
    return model.eval()


def test_weights_are_half_precision_at_most_ten_megabytes_and_of_no_seed(shipped: CLIP) -> None:
    with resources.as_file(FILES / "model.safetensors") as path:
        assert path.stat().st_size <= 10_000_000
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    state = torch.get_rng_state()
    other = build_tiny(TINY_TAG, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, other[name]) for name, tensor in shipped.state_dict().items())


def test_shipped_model_is_a_plain_open_clip_model_in_fp32(shipped: CLIP) -> None:
    assert {parameter.dtype for parameter in shipped.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in shipped.parameters()) == 4_070_913
    size = TINY_CONFIG["preprocess_cfg"]["size"]
    assert shipped.encode_image(torch.zeros(2, 3, size, size)).shape == (2, 128)
    assert shipped.encode_text(tiny_tokenizer()(["a", "b", "c"])).shape == (3, 128)
    assert any(isinstance(module, torch.nn.MultiheadAttention) for module in shipped.modules())
    assert size == shipped.visual.image_size[0] == 32
    assert TINY_CONFIG["preprocess_cfg"]["interpolation"] == "bicubic"


TEXTS = ["An image of the digit zero", "an anachronistic crêpe, ☂ & 42 zzxqj", "", "cat", "one " * 30]


def test_tokenizer_ids_fit_the_embedding_and_end_with_the_largest(shipped: CLIP) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(TEXTS)
    assert tokenizer.vocab_size == shipped.vocab_size == tokenizer.eot_token_id + 1
    assert tokens.shape == (len(TEXTS), shipped.context_length)
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < shipped.vocab_size
    assert (tokens[:, 0] == tokenizer.sot_token_id).all()
    ends = tokens.argmax(1)
    assert (tokens.gather(1, ends[:, None]) == tokenizer.eot_token_id).all()
    assert ((tokens == tokenizer.eot_token_id).sum(1) == 1).all()


def test_tokenizer_is_the_beginning_of_clips_own() -> None:
    cut, whole = tiny_tokenizer(), SimpleTokenizer()
    plain = cut.vocab_size - 2  # without the start and the end token
    assert [cut.decoder[i] for i in range(plain)] == [whole.decoder[i] for i in range(plain)]
    assert cut.decode(cut.encode("an umbrella ☂ over shuttlecocks")) == whole.decode(
        whole.encode("an umbrella ☂ over shuttlecocks")
    )


def card_figures() -> dict[str, float]:
    card = (FILES / "MODEL_CARD.md").read_text(encoding="utf-8")
    block = re.search(r"```json\n(.*?)```", card, re.DOTALL)
    assert block is not None
    figures: dict[str, float] = json.loads(block.group(1))
    return figures


@pytest.mark.slow
def test_zero_shot_figure_of_the_model_card_comes_out(script: ModuleType, shipped: CLIP) -> None:
    measured = script.zero_shot_digits(shipped)
    assert measured == pytest.approx(card_figures()["digits"], abs=0.005)
    assert measured < 0.4


def write_emoji(folder: Path) -> None:
    """The tree of npm's emoji-datasource-google with 20 small pictures, some of which the script must leave out."""
    generator = np.random.default_rng(0)
    (folder / "img" / "google" / "64").mkdir(parents=True)
    rows = []

    def picture(name: str) -> str:
        pixels = generator.integers(0, 256, (64, 64, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "img" / "google" / "64" / f"{name}.png")
        return f"{name}.png"

    names = [f"THING {chr(65 + i)}" for i in range(15)] + ["KEYCAP 7", "CLOCK FACE ONE OCLOCK", "BILLIARDS", "COAT"]
    for i, name in enumerate(names):
        short = "8ball" if name == "BILLIARDS" else f"short-name_{i}"
        row = {"name": name, "short_name": short, "short_names": [short, name.lower().replace(" ", "_")]}
        row |= {"unified": f"{0x1F600 + i:X}", "image": picture(f"e{i}"), "has_img_google": True}
        if i == 0:
            row["skin_variations"] = {
                tone: {"image": picture(f"e0-{tone}"), "has_img_google": True} for tone in ("1F3FB", "1F3FD")
            }
        rows.append(row)
    rows.append(
        {"name": "NOWHERE", "short_name": "no", "short_names": ["no"], "unified": "2A", "has_img_google": False}
    )
    (folder / "emoji.json").write_text(json.dumps(rows), encoding="utf-8")


def write_fashion(folder: Path) -> None:
    """Fashion-MNIST's four idx files with 40 images each."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    for split in ("train", "t10k"):
        pixels = generator.integers(0, 256, (40, 28, 28), dtype=np.uint8)
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 2051, 40, 28, 28) + pixels.tobytes())
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 2049, 40) + (np.arange(40, dtype=np.uint8) % 10).tobytes())


def test_script_leaves_out_digits_and_keeps_one_skin_tone_unseen(script: ModuleType, tmp_path: Path) -> None:
    write_emoji(tmp_path)
    images, names, concepts, held_out = script.read_emoji(tmp_path)
    said = [row[0] for row in names]
    assert len(said) == 16 and "coat" in said and "thing a" in said
    assert not {"keycap 7", "clock face one oclock", "billiards", "nowhere"} & set(said)
    assert images.shape == (18, 4, 64, 64) and len(concepts) == 18
    assert concepts[held_out].tolist() == [said.index("thing a")]
    assert all(re.search(r"\d", name) is None for row in names for name in row[1:])


@pytest.mark.slow
@pytest.mark.usefixtures("torch_settings")
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the script needs Muon of PyTorch 2.9")
def test_script_trains_the_same_weights_twice(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_emoji(tmp_path / "emoji")
    write_fashion(tmp_path / "fashion")
    trained: list[dict[str, Tensor]] = []
    for name in ("one", "two"):
        output = tmp_path / "out" / f"{name}.safetensors"
        options = {"emoji": tmp_path / "emoji", "fashion": tmp_path / "fashion", "output": output}
        options |= {"steps": 3, "batch": 16, "learning-rate": 0.01, "threads": 1, "log-every": 1}
        script.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
        trained.append(load_file(output))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    start = build_tiny("random", 0).half().state_dict()
    still = [name for name in start if torch.equal(start[name], trained[0][name])]
    assert still == [], "every tensor moves"
    assert {name: tensor.shape for name, tensor in trained[0].items()} == {n: t.shape for n, t in start.items()}
    printed = capsys.readouterr().out
    assert printed.count("step ") == 6
    figures = json.loads(printed[printed.rindex("{") :])
    assert set(figures) == {"digits", "fashion_seen", "fashion_unseen", "emoji_held_out_tone"}

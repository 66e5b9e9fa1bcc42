"""Writes the splits that ship with the package, for datasets that have none of their own.

    python scripts/write_split_indices.py

The images are not needed: their files are numbered from 1 to the size of the class. For Caltech 256 those sizes are
not at hand; its split is drawn where the images are, by the same rule from the same file names.
"""

import json
import re

import numpy as np

from randlora_pl.data import splits
from randlora_pl.data.readers import Samples, in_key_order, numbers_of
from randlora_pl.data.readers.trees import INDICES
from randlora_pl.data.sources import ArrayImages

EUROSAT = {
    "AnnualCrop": 3000,
    "Forest": 3000,
    "HerbaceousVegetation": 3000,
    "Highway": 2500,
    "Industrial": 2500,
    "Pasture": 2000,
    "PermanentCrop": 2500,
    "Residential": 3000,
    "River": 2500,
    "SeaLake": 3000,
}
EACH = 270

# all 8,677 images; CoOp's split file lists 8,242 of them by name, which are all but the 435 of Faces_easy
_CALTECH101 = """
Faces:435 Faces_easy:435 Leopards:200 Motorbikes:798 accordion:55 airplanes:800 anchor:42 ant:42 barrel:47
bass:54 beaver:46 binocular:33 bonsai:128 brain:98 brontosaurus:43 buddha:85 butterfly:91 camera:50 cannon:43
car_side:123 ceiling_fan:47 cellphone:59 chair:62 chandelier:107 cougar_body:47 cougar_face:69 crab:73
crayfish:70 crocodile:50 crocodile_head:51 cup:57 dalmatian:67 dollar_bill:52 dolphin:65 dragonfly:68
electric_guitar:75 elephant:64 emu:53 euphonium:64 ewer:85 ferry:67 flamingo:67 flamingo_head:45 garfield:34
gerenuk:34 gramophone:51 grand_piano:99 hawksbill:100 headphone:42 hedgehog:54 helicopter:88 ibis:80
inline_skate:31 joshua_tree:64 kangaroo:86 ketch:114 lamp:61 laptop:81 llama:78 lobster:41 lotus:66 mandolin:43
mayfly:40 menorah:87 metronome:32 minaret:76 nautilus:55 octopus:35 okapi:39 pagoda:47 panda:38 pigeon:45
pizza:53 platypus:34 pyramid:57 revolver:82 rhino:59 rooster:49 saxophone:40 schooner:63 scissors:39 scorpion:84
sea_horse:57 snoopy:35 soccer_ball:64 stapler:45 starfish:86 stegosaurus:59 stop_sign:64 strawberry:35
sunflower:85 tick:49 trilobite:86 umbrella:75 watch:239 water_lilly:37 wheelchair:59 wild_cat:34
windsor_chair:56 wrench:39 yin_yang:60
"""
CALTECH101 = {name: int(size) for name, size in (entry.split(":") for entry in _CALTECH101.split())}

Parts = dict[str, dict[str, list[int]]]


def eurosat() -> Parts:
    """The numbers of the validation and test images: 270 of each class, as in the paper."""
    entries = [(name, number) for name, size in EUROSAT.items() for number in range(1, size + 1)]
    labels = np.repeat(np.arange(len(EUROSAT)), list(EUROSAT.values()))
    numbers = numbers_of([f"{name}/{name}_{number}.jpg" for name, number in entries])
    # subsets of one seed are nested: the first 270 of each class are for testing, the next 270 for validation
    test = set(splits.few_shot(labels, numbers, EACH, splits.SPLIT_SEED).tolist())
    both = set(splits.few_shot(labels, numbers, 2 * EACH, splits.SPLIT_SEED).tolist())
    parts = {"val": sorted(both - test), "test": sorted(test)}
    return {
        part: {name: [entries[place][1] for place in places if entries[place][0] == name] for name in EUROSAT}
        for part, places in parts.items()
    }


def caltech101() -> Parts:
    """The numbers of the test images: a fifth of all, stratified; validation images are drawn from the others."""
    keys = [f"{name}/image_{number:04d}.jpg" for name, size in CALTECH101.items() for number in range(1, size + 1)]
    labels = np.repeat(np.arange(len(CALTECH101)), list(CALTECH101.values()))
    none = ArrayImages(np.zeros((0, 1, 1, 1), dtype=np.uint8), "none")
    whole: dict[str, Samples] = {"train": in_key_order(none, labels, keys, tuple(CALTECH101))}
    test: dict[str, list[int]] = {name: [] for name in CALTECH101}
    for key in splits.Splits(whole.get).test.keys:
        test[key.partition("/")[0]].append(int(key[-8:-4]))
    return {"test": test}


def main() -> None:
    for name, parts in {"eurosat": eurosat(), "caltech101": caltech101()}.items():
        text = json.dumps(parts, indent=1)
        text = re.sub(r"\[[^\]]*\]", lambda found: json.dumps(json.loads(found[0])), text)  # a class a line
        (INDICES / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

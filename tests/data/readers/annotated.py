"""Formats whose annotation files list the images: MATLAB, JSON, XML and text files of many shapes."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from scipy.io import savemat

from tests.data.readers.pictures import Made, Writer, colour, known, write_lines


def cars(root: Path) -> Made:
    """A MATLAB struct for each image (box, class from 1, file name), a cell array of class names."""
    home, write = root / "stanford_cars", Writer()
    names = [f"Maker{label % 49} Model-{label} {('SUV', 'Sedan', 'Coupe')[label % 3]} 2012" for label in range(196)]
    names[174] = "Ram C/V Cargo Van Minivan 2012"
    (home / "devkit").mkdir(parents=True)
    cell = np.empty((1, 196), dtype=object)
    cell[0] = names
    savemat(home / "devkit/cars_meta.mat", {"class_names": cell})
    kind = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for folder, each, path in (
        ("cars_train", 3, "devkit/cars_train_annos.mat"),
        ("cars_test", 2, "cars_test_annos_withlabels.mat"),
    ):
        annotations = np.empty((1, 196 * each), dtype=kind)
        for number in range(196 * each):
            label = number * 5 % 196
            write(home / folder / f"{number + 1:05d}.jpg", label)
            annotations[0, number] = (1, 1, 20, 12, np.uint8(label + 1), f"{number + 1:05d}.jpg")
        savemat(home / path, {"annotations": annotations})
    return Made({"train": 3, "test": 2}, names)


def dtd(root: Path) -> Made:
    """``images/CLASS/CLASS_NNNN.jpg`` and ten lists for each of three parts, of which the first is used."""
    home, write = root / "dtd/dtd", Writer()
    lists: dict[str, list[str]] = {"train1": [], "val1": [], "test1": [], "train2": [], "val2": [], "test2": []}
    for label, name in enumerate(known("dtd")):
        for number, part in enumerate(("train", "train", "val", "val", "test", "test")):
            path = f"{name}/{name}_{number + 1:04d}.jpg"
            write(home / "images" / path, label)
            lists[f"{part}1"].append(path)
            lists[f"{('test', 'train', 'val')[number // 2]}2"].append(path)
    for part, paths in lists.items():
        write_lines(home / "labels" / f"{part}.txt", paths)
    return Made({"train": 4, "test": 2})


def food101(root: Path) -> Made:
    """JSON of ``class: [class/number]``, the files without their suffix."""
    home, write = root / "food-101", Writer()
    meta: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    names = known("food101")
    for label, name in enumerate(names):
        for number in range(5):
            path = f"{name}/{1005755 + 31 * number}"
            write(home / "images" / f"{path}.jpg", label)
            meta["train" if number < 3 else "test"].setdefault(name, []).append(path)
    for split, listed in meta.items():
        write_lines(home / "meta" / f"{split}.txt", [path for paths in listed.values() for path in paths])
        (home / "meta" / f"{split}.json").write_text(json.dumps(listed))
    write_lines(home / "meta/classes.txt", names)
    return Made({"train": 3, "test": 2})


def fgvcaircraft(root: Path) -> Made:
    """Lists of ``number variant``, the variant with blanks and slashes; manufacturers and families beside them."""
    home, write = root / "fgvc-aircraft-2013b/data", Writer()
    names = [f"{707 + label}-{label % 9}00" for label in range(98)] + ["F/A-18", "Model B200"]
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(names):
        for number, split in enumerate(("train", "train", "train", "val", "test")):
            image = f"{1000000 + 977 * label + number:07d}"
            write(home / "images" / f"{image}.jpg", label)
            lists[split].append(f"{image} {name}")
    for split, listed in lists.items():
        write_lines(home / f"images_variant_{split}.txt", sorted(listed))
        write_lines(home / f"images_family_{split}.txt", [f"{line.split()[0]} Boeing 707" for line in listed])
    write_lines(home / "images_variant_trainval.txt", sorted(lists["train"] + lists["val"]))
    write_lines(home / "variants.txt", names)
    write_lines(home / "families.txt", ["Boeing 707"])
    return Made({"train": 3, "val": 1, "test": 1}, names)


def flowers102(root: Path, train: int = 10) -> Made:
    """``jpg/image_NNNNN.jpg``; a MATLAB row of labels from 1, and three rows of image numbers."""
    home, write = root / "flowers-102", Writer()
    parts = ("trnid",) * train + ("valid", "tstid")
    order = np.random.default_rng(102).permutation(102 * len(parts))
    labels = np.empty(len(order), dtype=np.uint8)
    sets: dict[str, list[int]] = {"trnid": [], "valid": [], "tstid": []}
    for place, number in enumerate(order.tolist()):
        label, part = place // len(parts), parts[place % len(parts)]
        labels[number] = label + 1
        sets[part].append(number + 1)
        write(home / "jpg" / f"image_{number + 1:05d}.jpg", label)
    savemat(home / "imagelabels.mat", {"labels": labels[None]})
    savemat(home / "setid.mat", {name: np.asarray([ids], dtype=np.uint16) for name, ids in sets.items()})
    checksums = ("flowers-102/imagelabels.mat", "flowers-102/setid.mat")
    return Made({"train": train, "val": 1, "test": 1}, checksums=checksums)


def oxfordpets(root: Path) -> Made:
    """``Name_of_breed_N class species breed``; the names of cats begin with a capital, those of dogs do not."""
    home, write = root / "oxford-iiit-pet", Writer()
    cats = {"Abyssinian", "Bengal", "Birman", "Bombay", "British Shorthair", "Egyptian Mau", "Maine Coon", "Persian"}
    cats |= {"Ragdoll", "Russian Blue", "Siamese", "Sphynx"}
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    for label, name in enumerate(known("oxfordpets")):
        stem = (name if name in cats else name.lower()).replace(" ", "_")
        for number in range(1, 6):
            write(home / "images" / f"{stem}_{number}.jpg", label)
            species = 1 if name in cats else 2
            lists["trainval" if number < 4 else "test"].append(f"{stem}_{number} {label + 1} {species} 1")
    for split, listed in lists.items():
        write_lines(home / "annotations" / f"{split}.txt", sorted(listed))
    return Made({"train": 3, "test": 2})


def cub200(root: Path) -> Made:
    """Files of ``image-number value``: path, class, whether it is for training."""
    home, write = root / "CUB_200_2011", Writer()
    folders = [f"{label + 1:03d}.Grey_headed_Bird_{label}" for label in range(200)]
    folders[0] = "001.Black_footed_Albatross"
    columns: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    for label, folder in enumerate(folders):
        for number in range(5):
            image = len(columns["images"]) + 1
            path = f"{folder}/{folder[4:]}_{number:04d}_{image}.jpg"
            write(home / "images" / path, label)
            columns["images"].append(f"{image} {path}")
            columns["image_class_labels"].append(f"{image} {label + 1}")
            columns["train_test_split"].append(f"{image} {int(number % 2 == 0)}")
    for name, listed in columns.items():
        write_lines(home / f"{name}.txt", listed)
    write_lines(home / "classes.txt", [f"{label + 1} {folder}" for label, folder in enumerate(folders)])
    write_lines(home / "bounding_boxes.txt", [f"{n + 1} 1.0 1.0 9.0 9.0" for n in range(len(columns["images"]))])
    return Made({"train": 3, "test": 2}, [folder[4:].replace("_", " ") for folder in folders])


def resisc45(root: Path) -> Made:
    """Folders of ``class_NNN.jpg``, and three lists of file names without folders."""
    home, write = root / "resisc45", Writer()
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(known("resisc45")):
        for number, split in enumerate(("train", "train", "train", "val", "test", "test"), 1):
            write(home / "NWPU-RESISC45" / name / f"{name}_{number:03d}.jpg", label)
            lists[split].append(f"{name}_{number:03d}.jpg")
    for split, listed in lists.items():
        write_lines(home / f"resisc45-{split}.txt", listed[::-1])
    return Made({"train": 3, "test": 2})


def sun397(root: Path) -> Made:
    """``/letter/place/image.jpg``, some places with a part such as ``outdoor``; the lists are of partition 1."""
    home, write = root / "SUN397", Writer()
    places = [f"/{'abcdefghijklmnopqrstuvwyz'[label // 16]}/place_{label:03d}" for label in range(397)]
    places[0] = "/a/abbey"
    places[9] = "/a/apartment_building/outdoor"
    lists: dict[str, list[str]] = {"Training": [], "Testing": []}
    for label, place in enumerate(places):
        for number in range(5):
            path = f"{place}/sun_{label:04x}{number}.jpg"
            write(home / path[1:], label)
            if number < 4:  # a partition leaves images out
                lists["Training" if number < 3 else "Testing"].append(path)
    for name, listed in lists.items():
        write_lines(home / f"{name}_01.txt", listed)
    write_lines(home / "ClassName.txt", places)
    return Made({"train": 3, "test": 1}, [place[3:].replace("/", " ").replace("_", " ") for place in places])


def ucf101(root: Path) -> Made:
    """CoOp's JSON: ``{split: [[path, label, class], ...]}``, here with the classes of a split in no order."""
    home, write = root / "ucf101", Writer()
    names = ["Apply_Eye_Makeup", "Apply_Lipstick", *(f"Do_Thing_{label:03d}" for label in range(2, 101))]
    lists: dict[str, list[list[str | int]]] = {"train": [], "val": [], "test": []}
    for label in sorted(range(101), key=lambda label: label * 7 % 101):
        for number, split in enumerate(("train", "train", "train", "val", "test"), 1):
            path = f"{names[label]}/v_{names[label].replace('_', '')}_g{number:02d}_c01.jpg"
            write(home / "UCF-101-midframes" / path, label)
            lists[split].append([path, label, names[label]])
    (home / "split_zhou_UCF101.json").write_text(json.dumps(lists))
    return Made({"train": 3, "val": 1, "test": 1}, names)


def pascalvoc(root: Path) -> Made:
    """An XML file for each image with a box for each object; a person's head has a box of its own that is no object.

    Each image here has two objects of different classes side by side on white, the second marked difficult.
    """
    home = root / "VOCdevkit/VOC2007"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (home / folder).mkdir(parents=True)
    names = known("pascalvoc")
    number = 0
    for split, each in (("train", 4), ("val", 2), ("test", 2)):
        images, aeroplanes = [], []
        for place in range(20 * each // 2):
            number += 1
            image = f"{number:06d}"
            pair = (2 * place % 20, (2 * place + 1) % 20)
            pixels = np.full((40, 64, 3), 255, dtype=np.uint8)
            pixels[8:32, 8:24] = colour(pair[0])
            pixels[8:40, 32:64] = colour(pair[1])
            Image.fromarray(pixels).save(home / f"JPEGImages/{image}.jpg", quality=95, subsampling=0)
            corners = ({"xmin": 9, "ymin": 9, "xmax": 24, "ymax": 32}, {"xmax": 64, "xmin": 33, "ymin": 9, "ymax": 40})
            _annotate(home / f"Annotations/{image}.xml", [names[label] for label in pair], corners)
            images.append(image)
            aeroplanes.append(f"{image} {' 1' if 0 in pair else '-1'}")
        write_lines(home / f"ImageSets/Main/{split}.txt", images)
        write_lines(home / f"ImageSets/Main/aeroplane_{split}.txt", aeroplanes)
    return Made({"train": 4, "val": 2, "test": 2})


def _annotate(path: Path, names: list[str], corners: tuple[dict[str, int], ...]) -> None:
    top = ElementTree.Element("annotation")
    ElementTree.SubElement(top, "folder").text = "VOC2007"
    ElementTree.SubElement(top, "filename").text = f"{path.stem}.jpg"
    for place, (name, box) in enumerate(zip(names, corners, strict=True)):
        thing = ElementTree.SubElement(top, "object")
        ElementTree.SubElement(thing, "name").text = name
        ElementTree.SubElement(thing, "difficult").text = str(place)
        _box(thing, box)
        part = ElementTree.SubElement(thing, "part")
        ElementTree.SubElement(part, "name").text = "head"
        _box(part, {"xmin": 10, "ymin": 10, "xmax": 12, "ymax": 12})
    ElementTree.ElementTree(top).write(path)


def _box(parent: ElementTree.Element, corners: dict[str, int]) -> None:
    box = ElementTree.SubElement(parent, "bndbox")
    for side, value in corners.items():
        ElementTree.SubElement(box, side).text = str(value)


def emoji(root: Path) -> Made:
    """A list with the image file of each emoji and skin tone; names are shouted, short names have signs and digits."""
    home, write, names, rows = root / "emoji", Writer(), [], []

    def row(code: int, name: str | None, *short_names: str, tones: bool = True, drawn: bool = True) -> None:
        images = {"": f"{code:x}.png"}
        if tones:
            images |= {tone: f"{code:x}-{tone.lower()}.png" for tone in ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")}
        if drawn:
            for image in images.values():
                write(home / "img/google/64" / image, (code - 0x1F000) % 1000)
        plain, *others = [{"image": image, "has_img_google": drawn} for image in images.values()]
        entry = {"name": name, "short_names": short_names, "unified": f"{code:X}", "category": "A", "subcategory": "a"}
        entry |= plain
        rows.append(entry | ({"skin_variations": dict(zip([*images][1:], others, strict=True))} if tones else {}))

    for label in range(313):
        word = "".join(chr(97 + label // 26**power % 26) for power in (2, 1, 0))
        names.append(f"{word} up")
        forms = [(f"{word} SIGN UP", f"{word}_up"), (f"{word} UP", f"{word}-2"), (None, f"{word}-up", "other")]
        row(0x1F000 + label, *forms[label % 3])
    row(0x2B50, "STAR", "star", tones=False)
    row(0x1F9DE, "NOT DRAWN", "not_drawn", drawn=False)
    row(0x1F3C2, "AND SIX WORDS ARE TOO MANY", "its_short_name_has_six_words")
    row(0x0031, "KEYCAP 1", "1")
    (home / "emoji.json").write_text(json.dumps(rows[::-1]), encoding="utf-8")
    return Made({"train": 5, "test": 1}, names)

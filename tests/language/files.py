"""Tiny files in the true formats of the language experiments."""

import json
from pathlib import Path

LETTERS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}
"""What the questions of each test offer."""


def record(task: str, number: int) -> dict[str, str]:
    """One record as LLM-Adapters writes it."""
    offered = LETTERS[task]
    answer = offered[number % len(offered)]
    options = " ".join(f"{option.capitalize()}: thing {place}" for place, option in enumerate(offered))
    instruction = f"Please choose the correct answer: what is {number}?\n\n{options}\n\nAnswer format: "
    return {
        "instruction": instruction + "/".join(offered),
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def write_commonsense(root: Path, count: int = 6, nested: bool = False) -> Path:
    """Training files and the eight tests; ``nested`` as in the repository, otherwise flat."""
    train, tests = (root / "ft-training_set", root / "dataset") if nested else (root, root)
    train.mkdir(parents=True, exist_ok=True)
    mixed = [record(task, number) for number in range(count) for task in LETTERS]
    (train / "commonsense_15k.json").write_text(json.dumps(mixed, indent=4))
    (train / "commonsense_170k.json").write_text(json.dumps(mixed * 2, indent=4))
    for task in LETTERS:
        (tests / task).mkdir(parents=True)
        (tests / task / "test.json").write_text(json.dumps([record(task, number) for number in range(count)], indent=4))
    return root


def write(path: Path, *lines: str | tuple[str, ...]) -> None:
    """Lines with fields between tabs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(("\t".join(line) if isinstance(line, tuple) else line) + "\n" for line in lines)


PARAPHRASES = [
    ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    ("1", "702876", "702977", 'Amrozi accused his brother, whom he called "the witness".', "Referring to him."),
    ("0", "2108705", "2108831", "Yucaipa owned Dominick's.", '"Yucaipa bought it in 1995.'),
    ("1", "1330381", "1330521", "They had published an advertisement.", "On June 10, they had published it."),
]


RTE = ("index", "sentence1", "sentence2", "label")


def write_glue(root: Path) -> Path:
    """GLUE's folders with the columns and traps of the true files: quotes that never close, CoLA without a header."""
    front = ("main-captions", "MSRvid", "2012test", "0001", "none", "none")
    for split, start in (("train", "0"), ("dev", "7")):
        second = str(int(start) + 1)
        tables: dict[str, list[tuple[str, ...]]] = {
            "SST-2": [
                ("sentence", "label"),
                ('hide new secretions from the "parental units ', "0"),
                ("contains no wit\u2028, only labored gags ", "1" if split == "dev" else "0"),
                ('that loves its characters and "communicates ', "1"),
            ],
            "CoLA": [
                ("gj04", "1", "", "Our friends won't buy this \"analysis."),
                ("ks08", "0", "*", "They drank the pub."),
            ],
            "QNLI": [
                ("index", "question", "sentence", "label"),
                (start, 'When did "the third end?', "It ended in 3000 BC.", "entailment"),
                (second, "Where is it?", 'Nobody "knows".', "not_entailment"),
            ],
            "RTE": [
                RTE,
                (start, "No weapons were found.", "Weapons were found.", "not_entailment"),
                (second, "A place of sorrow.", "A place.", "entailment"),
            ],
            "STS-B": [
                ("index", "genre", "filename", "year", "old_index", "source1", "source2", *RTE[1:3], "score"),
                (start, *front, 'A plane is "taking off.', "An air plane is taking off.", "5.000"),
                (second, *front, "A man plays.", "A girl sings.", "0.500"),
            ],
            "MRPC": [PARAPHRASES[0], *(PARAPHRASES[1:3] if split == "train" else PARAPHRASES[3:])],
        }
        for folder, rows in tables.items():
            write(root / folder / f"{split}.tsv", *rows)
    return root


E2E = [
    "name : The Vaults | Type : pub | price : more than £ 30||The Vaults pub has prices over £30 .",
    "name : Aromi | Type : coffee shop || Aromi is a coffee shop , not family-friendly .",
    "",
    "name : The Vaults | Type : pub | price : more than £ 30||A pub called The Vaults is expensive .",
    "name : Aromi | Type : coffee shop||There is a coffee shop Aromi near Café Sicilia .",
]


def write_e2e(root: Path, more: int = 0) -> Path:
    """The three splits, all with the same lines.

    Args:
        root: Their folder.
        more: Further meaning representations, each with two references.
    """
    further = [
        f"name : Café {number} | near : Raja Indian Cuisine || Café {number} is {where} Raja Indian Cuisine ."
        for number in range(more)
        for where in ("near", "close to")
    ]
    for name in ("train", "valid", "test"):
        write(root / f"{name}.txt", *E2E, *further)
    return root

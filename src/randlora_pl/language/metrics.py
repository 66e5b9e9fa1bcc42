"""Metrics of generated and labelled texts.

Scores of generated text against several references each are BLEU, NIST, METEOR, ROUGE-L and CIDEr, as E2E counts them.
E2E's evaluation takes BLEU and NIST from NIST's program mteval (version 13a; its tokens, lower case) and the other
three from COCO's evaluation of captions (see `words`). BLEU comes from sacrebleu, METEOR from METEOR 1.5, ROUGE-L and
CIDEr from pycocoevalcap; without these packages the functions raise a `UserError`. NIST is written here: nltk takes the
best reference for each order of n-grams, but mteval counts the n-grams of all references of a text, so that the two
agree with one reference only.
"""

import importlib.util
import math
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from randlora_pl.language import glue
from randlora_pl.utils.errors import UserError, install, log

# The tokenizer that this follows writes pounds as # and euros as $. Same marks are the same word either way, but the
# counts of a test against it are exact only so.
_SAME = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": " - ", "—": " - ", "£": "#", "€": "$"})

_PARTS = re.compile(
    r"""
    n't | '(?:s|re|ve|ll|d|m)\b          # what contractions leave
    | (?:[^\W\d_]\.){2,}                 # e.g. and u.k.
    | \w+ (?: (?: - (?=\w)               # family-friendly, 20-25
              | (?<=\d)[.,](?=\d)        # 3.5 and 1,000
              | (?<=[^\W\d])[./'&](?=[^\W\d])  # pub/bar
              ) \w+ )*
    | \S
    """,
    re.VERBOSE,
)
_PUNCTUATION = frozenset("'`\".?!,:;-(){}")


def words(text: str) -> list[str]:
    """Return the words of a sentence: Penn Treebank tokens, lower case, without punctuation.

    COCO's evaluation, which E2E's uses for METEOR, ROUGE-L and CIDEr, calls Stanford's PTBTokenizer 3.4.1 (Java) and
    drops punctuation. This gives the same words for what E2E's sentences hold (contractions, hyphens, prices, ratings,
    sentences that run into one another); abbreviations with one full stop and slang may differ.
    """
    text = text.translate(_SAME).lower()
    text = re.sub(r"\bcannot\b", "can not", text)
    text = re.sub(r"(?<=\w)n't\b", " n't", text)
    text = re.sub(r"(?<=\w)'(s|re|ve|ll|d|m)\b", r" '\1", text)
    return [part for part in _PARTS.findall(text) if part not in _PUNCTUATION]


def meteor(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float | None, str]:
    """Compute METEOR 1.5 of the corpus in 0..1, as COCO's evaluation calls it (all four kinds of matches).

    pycocoevalcap brings its program along (Denkowski and Lavie, 2014), with word lists, synonyms and paraphrases; it
    needs Java. nltk's METEOR is an older definition with other weights, whose scores cannot be compared with published
    ones. pycocoevalcap's own caller waits for ever where the program ends early, so it is called from here.

    Returns:
        The score and an empty text, or None and the reason with what to do.
    """
    if shutil.which("java") is None:
        return None, "METEOR needs Java: install a Java runtime, such as the package default-jre-headless"
    if (program := _program()) is None:
        return None, f"METEOR needs the program in pycocoevalcap: {install('e2e')}"
    most = max(map(len, references))
    # Each text has as many references in the file: the best counts, so that the first again changes nothing.
    groups = [[*group, *[group[0]] * (most - len(group))] for group in references]
    # Sentences are English and are normalized, as in COCO's evaluation.
    options = ("-l", "en", "-norm", "-q", "-r", str(most))
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/texts", f"{folder}/references"]
            for file, sentences in zip(files, (texts, chain.from_iterable(groups)), strict=True):
                lines = (" ".join(words(each)).replace("|", " ").strip() or "." for each in sentences)  # none is empty
                Path(file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            command = ["java", "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(program), *files, *options]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"exit code {done.returncode}")
        return float(done.stdout), ""
    except (OSError, ValueError) as error:
        return None, f"METEOR's program failed ({error}): check `java -version` (METEOR needs 2 GB of memory)"


def _program() -> Path | None:
    """Return the program in the package, which is not imported: that would load more than is needed."""
    package = importlib.util.find_spec("pycocoevalcap")
    for folder in package.submodule_search_locations or () if package else ():
        program = Path(folder) / "meteor" / "meteor-1.5.jar"
        if program.is_file():
            return program
    return None


References = Sequence[Sequence[str]]
"""The references of each text."""

Ngrams = Counter[tuple[str, ...]]


def generation_scores(texts: Sequence[str], references: References) -> dict[str, float]:
    """Compute all five scores.

    Args:
        texts: The generated text of each meaning representation; at least one.
        references: The references of each, one or more.

    Returns:
        ``BLEU``, ``METEOR`` and ``ROUGE-L`` in 0..100, ``NIST`` from 0 and ``CIDEr`` in 0..10 (8.8 and 2.5 are good on
        E2E). METEOR is left out with a warning if its program is missing.

    Raises:
        ValueError: The corpus is empty, or a text has no reference.
        UserError: The package sacrebleu or pycocoevalcap is missing.
    """
    if not texts or len(texts) != len(references) or not all(references):
        raise ValueError(f"{len(texts)} texts for {len(references)} groups of references, each needs one or more")
    scores = {"BLEU": bleu(texts, references), "NIST": nist(texts, references)}
    value, reason = meteor(texts, references)
    if value is None:
        log.warning("METEOR is left out. %s", reason)
    else:
        scores["METEOR"] = 100 * value
    return {**scores, "ROUGE-L": 100 * rouge_l(texts, references), "CIDEr": cider(texts, references)}


def bleu(texts: Sequence[str], references: References) -> float:
    """Compute BLEU-4 of the corpus in 0..100: tokens of mteval 13a, lower case, closest reference length."""
    metrics = _scorer("sacrebleu.metrics")
    # sacrebleu wants the first references of all texts, then the second ones; where a text has fewer, None.
    most = max(map(len, references))
    streams = [[group[index] if index < len(group) else None for group in references] for index in range(most)]
    score = metrics.BLEU(lowercase=True, tokenize="13a", force=True).corpus_score(list(texts), streams)
    return float(score.score)


def nist(texts: Sequence[str], references: References, order: int = 5) -> float:
    """Compute NIST of the corpus (Doddington, 2002) with tokens of mteval 13a in lower case.

    Each matched n-gram counts by its information, log2 of how often its beginning occurs in all references over how
    often it does itself; a text may match an n-gram as often as the reference with the most of it. The length is
    compared with the mean length of a text's references.
    """
    tokenize = _scorer("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    known = [[tokenize(reference.lower()).split() for reference in group] for group in references]
    counts: Ngrams = Counter()
    for group in known:
        for reference in group:
            counts.update(_ngrams(reference, order))
    total = sum(count for ngram, count in counts.items() if len(ngram) == 1)
    gained, possible = [0.0] * order, [0] * order
    length, expected = 0, 0.0
    for text, group in zip(texts, known, strict=True):
        written = tokenize(text.lower()).split()
        most: Ngrams = Counter()
        for reference in group:
            most |= _ngrams(reference, order)
        own = _ngrams(written, order)
        for ngram, count in (own & most).items():
            before = counts[ngram[:-1]] if len(ngram) > 1 else total
            gained[len(ngram) - 1] += count * math.log2(before / counts[ngram])
        for ngram, count in own.items():
            possible[len(ngram) - 1] += count
        length += len(written)
        expected += sum(map(len, group)) / len(group)
    # The penalty is a half at two thirds of the expected length.
    ratio = min(length / expected, 1.0) if expected else 1.0
    penalty = math.exp(math.log(0.5) * (math.log(ratio) / math.log(1.5)) ** 2) if ratio > 0 else 0.0
    return penalty * sum(gain / count for gain, count in zip(gained, possible, strict=True) if count)


def rouge_l(texts: Sequence[str], references: References) -> float:
    """Compute ROUGE-L as COCO defines it, mean over the texts in 0..1."""
    return _coco(_scorer("pycocoevalcap.rouge.rouge").Rouge(), texts, references)


def cider(texts: Sequence[str], references: References) -> float:
    """Compute CIDEr as COCO does (Vedantam et al., 2015; its variant D), mean over the texts in 0..10.

    With a single text every inverse document frequency is 0, and so is the score.
    """
    return _coco(_scorer("pycocoevalcap.cider.cider").Cider(), texts, references)


def _coco(scorer: Any, texts: Sequence[str], references: References) -> float:
    own = {number: [" ".join(words(text))] for number, text in enumerate(texts)}
    known = {number: [" ".join(words(text)) for text in group] for number, group in enumerate(references)}
    if not any(map(any, known.values())):  # no reference has a word
        return 0.0
    return float(scorer.compute_score(known, own)[0])


def _ngrams(tokens: Sequence[str], order: int) -> Ngrams:
    sizes = range(1, order + 1)
    return Counter(tuple(tokens[start : start + n]) for n in sizes for start in range(len(tokens) - n + 1))


def need_scorers() -> None:
    """Raise an error if a package of the scores other than METEOR is missing."""
    for module in ("metrics", "tokenizers.tokenizer_13a"):
        _scorer(f"sacrebleu.{module}")
    for module in ("rouge.rouge", "cider.cider"):
        _scorer(f"pycocoevalcap.{module}")


def _scorer(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"scores of E2E need {module.partition('.')[0]} ({error}): {install('e2e')}") from error


def grades(metric: glue.Metric, predicted: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return the metrics of predicted class numbers or scores; the selected one, which the paper reports, is the first.

    Returns:
        For classes ``acc`` in 0..1, ``matthews`` in -1..1 and ``f1`` in 0..1, of class 1 if there are two, otherwise
        the mean over the classes. For scores ``pearson``, ``spearman`` and ``combined``, their mean, which the released
        scripts report although the paper says Pearson's. A correlation with a constant is 0.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if metric == "pearson":
        if len(set(predicted)) == 1 or len(set(labels)) == 1:
            return {"pearson": 0.0, "spearman": 0.0, "combined": 0.0}
        pearson, spearman = float(pearsonr(predicted, labels)[0]), float(spearmanr(predicted, labels)[0])
        return {"pearson": pearson, "spearman": spearman, "combined": (pearson + spearman) / 2}
    seen = {*predicted, *labels}
    average = "binary" if seen <= {0, 1} else "macro"
    values = {
        "acc": float(accuracy_score(labels, predicted)),
        "matthews": float(matthews_corrcoef(labels, predicted)) if len(seen) > 1 else 0.0,  # which would warn
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0.0)),
    }
    return {metric: values[metric], **values}


class PredictionCollector(Metric):
    """All predictions of an evaluation, gathered from all devices: a mean over batches would be no correlation."""

    full_state_update = False
    predicted: list[Tensor]
    labels: list[Tensor]
    losses: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("predicted", "labels", "losses"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Add the predictions of one batch, all (b,); b may be 0 if a device only pads."""
        for held, values in zip((self.predicted, self.labels, self.losses), (predicted, labels, losses), strict=True):
            held.append(values.detach())

    def compute(self) -> dict[str, Any]:
        """Return the whole set's ``predicted`` and ``labels`` as lists, and its mean ``loss``."""
        predicted, labels, losses = (dim_zero_cat(held).cpu() for held in (self.predicted, self.labels, self.losses))
        return {
            "predicted": predicted.tolist(),
            "labels": labels.tolist(),
            "loss": float(losses.to(torch.float64).mean()),
        }

"""Scores of generated text against several references each: BLEU, NIST, METEOR, ROUGE-L and CIDEr, as E2E counts them.

E2E's evaluation takes BLEU and NIST from NIST's program mteval (version 13a; its tokens, lower case) and the other
three from COCO's evaluation of captions (see `words`). BLEU comes from sacrebleu and METEOR from METEOR 1.5 itself;
the others are written here, since no kept library has them by these definitions, and are tested against nltk (NIST) and
pycocoevalcap (ROUGE-L, CIDEr).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType

from randlora_pl.language.metrics.meteor import meteor
from randlora_pl.language.metrics.ptb_tokens import words
from randlora_pl.utils.errors import UserError

References = Sequence[Sequence[str]]
"""The references of each text."""

Ngrams = Counter[tuple[str, ...]]


def generation_scores(texts: Sequence[str], references: References) -> dict[str, float | str]:
    """All five scores.

    Args:
        texts: The generated text of each meaning representation; at least one.
        references: The references of each, one or more.

    Returns:
        ``BLEU``, ``METEOR`` and ``ROUGE-L`` in 0..100, ``NIST`` from 0 and ``CIDEr`` in 0..10 (8.8 and 2.5 are good on
        E2E). Where METEOR cannot be computed ``METEOR missing`` says why in its place.

    Raises:
        ValueError: There is no text, or one has no reference.
        UserError: The package sacrebleu is missing.
    """
    if not texts or len(texts) != len(references) or not all(references):
        raise ValueError(f"{len(texts)} texts for {len(references)} groups of references, each needs one or more")
    found: dict[str, float | str] = {"BLEU": bleu(texts, references), "NIST": nist(texts, references)}
    value, reason = meteor(texts, references)
    if value is None:
        found["METEOR missing"] = reason
    else:
        found["METEOR"] = 100 * value
    return {**found, "ROUGE-L": 100 * rouge_l(texts, references), "CIDEr": cider(texts, references)}


def bleu(texts: Sequence[str], references: References) -> float:
    """BLEU of the corpus with four-grams in 0..100: tokens of mteval 13a, lower case, the closest length counts.

    Raises:
        UserError: The package sacrebleu is missing.
    """
    metrics = need_sacrebleu().metrics
    # sacrebleu wants the first references of all texts, then the second ones; where a text has fewer, None.
    most = max(map(len, references))
    streams = [[group[place] if place < len(group) else None for group in references] for place in range(most)]
    score = metrics.BLEU(lowercase=True, tokenize="13a", force=True).corpus_score(list(texts), streams)
    return float(score.score)


def nist(texts: Sequence[str], references: References, order: int = 5) -> float:
    """NIST of the corpus (Doddington, 2002) with tokens of mteval 13a in lower case.

    Each matched n-gram counts by its information, log2 of how often its beginning occurs in all references over how
    often it does itself; a text may match an n-gram as often as the reference with the most of it. The length is
    compared with the mean length of a text's references.

    Raises:
        UserError: The package sacrebleu is missing.
    """
    tokenize = need_sacrebleu().tokenizers.tokenizer_13a.Tokenizer13a()
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


def rouge_l(texts: Sequence[str], references: References, beta: float = 1.2) -> float:
    """ROUGE-L as COCO defines it, mean over the texts in 0..1.

    The longest common subsequence gives a precision and a recall with each reference; the best of either are joined in
    an F measure in which recall weighs ``beta`` squared.
    """
    scores = []
    for text, group in zip(texts, references, strict=True):
        own = words(text)
        precision = recall = 0.0
        for reference in map(words, group):
            common = _common(own, reference)
            precision = max(precision, common / max(len(own), 1))
            recall = max(recall, common / max(len(reference), 1))
        both = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / both if both else 0.0)
    return sum(scores) / len(scores)


def cider(texts: Sequence[str], references: References, order: int = 4, sigma: float = 6.0) -> float:
    """CIDEr as COCO computes it (Vedantam et al., 2015; its variant D), mean over the texts in 0..10.

    The cosine of n-gram counts weighted by inverse document frequency, where a document is the references of one text;
    counts of a text are clipped to the reference's and a difference in length is punished. With a single text every
    weight is 0, and so is the score.
    """
    known = [[_ngrams(words(reference), order) for reference in group] for group in references]
    documents: Counter[tuple[str, ...]] = Counter()
    for group in known:
        documents.update(set().union(*group))
    idf = {ngram: math.log(len(known) / count) for ngram, count in documents.items()}
    unseen = math.log(len(known))

    def weighted(counts: Ngrams) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(order)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * idf.get(ngram, unseen)
        return vectors

    scores = []
    for text, group in zip(texts, known, strict=True):
        counts = _ngrams(words(text), order)
        own, length = weighted(counts), _pairs(counts)
        total = 0.0
        for reference in group:
            near = math.exp(-((length - _pairs(reference)) ** 2) / (2 * sigma**2))
            total += near * sum(_cosine(*both) for both in zip(own, weighted(reference), strict=True)) / order
        scores.append(10 * total / len(group))
    return sum(scores) / len(scores)


def _ngrams(tokens: Sequence[str], order: int) -> Ngrams:
    """How often each n-gram of up to ``order`` tokens occurs."""
    sizes = range(1, order + 1)
    return Counter(tuple(tokens[start : start + n]) for n in sizes for start in range(len(tokens) - n + 1))


def _pairs(counts: Ngrams) -> int:
    """COCO's length of a sentence: its number of bigrams."""
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _cosine(text: Mapping[tuple[str, ...], float], reference: Mapping[tuple[str, ...], float]) -> float:
    """Cosine of two sparse vectors, the text's entries clipped to the reference's in the product."""
    norm = math.hypot(*text.values()) * math.hypot(*reference.values())
    product = sum(min(value, reference.get(key, 0.0)) * reference.get(key, 0.0) for key, value in text.items())
    return product / norm if norm else 0.0


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            diagonal, row[place] = row[place], diagonal + 1 if token == other else max(row[place], row[place - 1])
    return row[-1]


def need_sacrebleu() -> ModuleType:
    """The package, with the two modules that are used.

    Raises:
        UserError: It is missing.
    """
    try:
        import sacrebleu
        import sacrebleu.metrics
        import sacrebleu.tokenizers.tokenizer_13a
    except ImportError as error:
        raise UserError(f'BLEU and NIST need sacrebleu ({error}): pip install "randlora-pl[language]"') from error
    return sacrebleu

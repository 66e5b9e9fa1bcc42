"""METEOR 1.5 (Denkowski and Lavie, 2014) through its own program, which pycocoevalcap brings along.

The program holds its word lists, synonyms and paraphrases, so nothing is downloaded; it needs Java. nltk's METEOR is an
older definition with other weights and wants WordNet's files: its figures cannot be put beside published ones.
"""

import shutil
from collections.abc import Sequence

from randlora_pl.language.tokens import words


def meteor(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float | None, str]:
    """METEOR of the corpus in 0..1, as COCO's evaluation calls it (English, normalised, all four kinds of matches).

    Args:
        texts: The generated texts.
        references: The references of each.

    Returns:
        The score and an empty text, or ``None`` and why there is none with what to do.
    """
    if shutil.which("java") is None:
        return None, "METEOR needs Java: install a Java runtime, such as the package default-jre-headless"
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError as error:
        return None, f'METEOR needs pycocoevalcap ({error}): pip install "randlora-pl[meteor]"'
    # Its protocol separates by bars, and an empty line would be no sentence.
    own = {place: [" ".join(words(text)).replace("|", " ") or "."] for place, text in enumerate(texts)}
    known = {
        place: [" ".join(words(reference)).replace("|", " ") or "." for reference in group]
        for place, group in enumerate(references)
    }
    try:
        score, _ = Meteor().compute_score(known, own)
    except (OSError, ValueError) as error:  # the pipe breaks, or an answer is no number
        return None, f"METEOR's program failed ({error}): try `java -version`; it needs 2 GB of memory"
    return float(score), ""

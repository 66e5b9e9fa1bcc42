"""Words as the evaluation of image captions counts them: Penn Treebank tokens, lower case, without punctuation."""

import re

_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": " - ", "—": " - "})

# The tokenizer that this follows writes pounds as # and euros as $. Same marks are the same word either way, but the
# counts of a test against it are exact only so.
_CURRENCIES = str.maketrans({"£": "#", "€": "$"})

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
    """Return the words of a sentence.

    COCO's evaluation, which E2E's uses for METEOR, ROUGE-L and CIDEr, calls Stanford's PTBTokenizer 3.4.1 (Java) and
    drops punctuation. This gives the same words for what E2E's sentences hold (contractions, hyphens, prices, ratings,
    sentences that run into one another); abbreviations with one full stop and slang may differ.
    """
    text = text.translate(_QUOTES).translate(_CURRENCIES).lower()
    text = re.sub(r"\bcannot\b", "can not", text)
    text = re.sub(r"(?<=\w)n't\b", " n't", text)
    text = re.sub(r"(?<=\w)'(s|re|ve|ll|d|m)\b", r" '\1", text)
    return [part for part in _PARTS.findall(text) if part not in _PUNCTUATION]

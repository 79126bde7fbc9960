"""Words of error texts and warnings."""

from __future__ import annotations

import re
from typing import Any

#: Letters whose names begin with a vowel, and words that begin with one in writing alone.
_VOWELS, _AS_YOU = frozenset("AEFHILMNORSX"), re.compile(r"uni(?!n)|us[aei]|eu")


def with_article(word: str) -> str:
    """A word after its article; two capitals at its beginning are read letter by letter.

    Example:
        >>> [with_article(word) for word in ("Linear", "AveragedModel", "LSTM", "UNet", "UninitializedParameter")]
        ['a Linear', 'an AveragedModel', 'an LSTM', 'a UNet', 'an UninitializedParameter']
    """
    plain = word.lstrip("_")
    if plain[:2].isupper() and len(plain) > 1:
        vowel = plain[0] in _VOWELS
    else:
        vowel = plain[:1].lower() in {*"aeiou"} and _AS_YOU.match(plain.lower()) is None
    return f"an {word}" if vowel else f"a {word}"


def type_of(value: Any) -> str:
    """The name of the type of a value after its article."""
    return with_article(type(value).__name__)

"""The name of an entry, as the leaderboards have it."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Sequence

__all__ = ["check_name", "name_checked"]

_ARTICLES = ("a", "an", "the")
# Family name and year, first word of the title, and what tells several models of one paper apart. Of the entries of
# the leaderboards all have it but the baselines Standard, Standard_R50 and AlexNet and Geirhos2018_SIN and its kin.
_NAME = re.compile(
    r"(?P<author>[A-Z][A-Za-z-]*)(?P<year>(?:19|20)\d\d)(?P<word>[A-Z][A-Za-z0-9-]*)(?:_[A-Za-z0-9.-]+)*"
)


def check_name(name: str, *, title: str | None = None, authors: Sequence[str] | None = None) -> None:
    """Checks the name of an entry against the pattern of the leaderboard's.

    Args:
        name: such as 'Cui2023Decoupled_WRN-28-10': family name of the first author, year, first word of the title that
            is no article, and, where a paper has several models, an underscore and what tells them apart.
        title, authors: of the paper, first names first.

    Raises:
        TypeError: ``name`` is no text.
        ValueError: the name has another pattern.

    Warns:
        UserWarning: it has the pattern, but not with this title or this first author.
    """
    name_checked("check_name", name, title, authors)


def name_checked(caller: str, name: str, title: str | None, authors: Sequence[str] | None, stacklevel: int = 4) -> None:
    """:func:`check_name` for another caller."""
    if not isinstance(name, str):
        raise TypeError(f"{caller}: `name` must be text, got {type(name).__name__}. Write Cui2023Decoupled_WRN-28-10.")
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{caller}: `name` must be <FamilyName><Year><FirstWordOfTitle>, perhaps with _<Suffix>, got "
            f"{name!r}. Write Cui2023Decoupled_WRN-28-10."
        )
    if title is not None:
        words = [word for word in title.split() if word.casefold() not in _ARTICLES and _letters(word)]
        first, word = _letters(words[0]) if words else "", _letters(found["word"])
        if not (word.startswith(first) or first.startswith(word)):
            _warn(caller, found["word"], "first word of the title", words[0], stacklevel)
    if authors and authors[0].split():
        family = authors[0].split()[-1]
        if not _letters(found["author"]).startswith(_letters(family)):
            _warn(caller, found["author"], "family name of the first author", family, stacklevel)


def _warn(caller: str, found: str, what: str, expected: str, stacklevel: int) -> None:
    text = f"{caller}: `name` has {found} where RobustBench has the {what}, which is {expected}."
    warnings.warn(text, UserWarning, stacklevel=stacklevel)


def _letters(word: str) -> str:
    """Letters and digits without accents and case."""
    return "".join(c for c in unicodedata.normalize("NFKD", word) if c.isalnum()).casefold()

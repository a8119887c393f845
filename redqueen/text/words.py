"""Rule 4 of the canonical form: what was done to words with separators, leet and repeats.

Input is folded text without links (see `folding`, `links`). Each stage is linear in the length of the text
and leaves alone what it does not understand; `reading` knows which stages a text may need.
"""

from __future__ import annotations

import re
from operator import ne

from redqueen.text.folding import ALPHABETIC as _L

_LETTER = re.compile(f"[{_L}]")

# --- separators ---------------------------------------------------------------------------------------------

_SEPARATOR = r".\-_*~/\\,+|'\"^=;:?!#&<>()\[\]{}\u00b7\u2022"
# One and the same separator between four letters or more (three where it is a mark that no abbreviation
# uses), or any mixture of separators that are not blanks.
_SPELT_OUT = re.compile(
    rf"(?<![{_L}0-9])[{_L}](?:([ \n\r]{{1,3}})[{_L}](?:\1[{_L}]){{2,}}"
    rf"|([{_SEPARATOR}]{{1,3}})[{_L}](?:\2[{_L}]){{2,}}|([*_~\u00b7\u2022])[{_L}]\3[{_L}]"
    rf"|[{_SEPARATOR}][{_L}](?:[{_SEPARATOR}][{_L}]){{2,}})"
    rf"(?![{_L}0-9])"
)
_SEPARATORS = re.compile(rf"[ \n\r{_SEPARATOR}]+")


def join_spelt(text: str) -> tuple[str, int]:
    """Words spelt out letter by letter, joined; how many letters had been parted."""
    changed = 0

    def join(match: re.Match[str]) -> str:
        nonlocal changed
        word = _SEPARATORS.sub("", match.group())
        changed += len(word)
        return word

    return _SPELT_OUT.sub(join, text), changed


# --- leet ---------------------------------------------------------------------------------------------------

_MARKS_BEFORE = re.compile(rf"[*~^`\u00b7\u2022]{{1,3}}(?=[{_L}])")
_SIGNS = "€£¢¥₿₦₮₱₴₣₲₡₭©®"
_INSIDE = rf"013457@$!|{_SIGNS}"
_LEET_WORD = re.compile(
    rf"(?<![{_L}0-9@$!|€])[0134@${_SIGNS}]?[{_L}]+(?:[{_INSIDE}]{{1,3}}[{_L}]+)+[013457$]{{0,3}}(?![{_L}0-9])"
)
_LEET_EDGE = re.compile(
    rf"(?<![{_L}0-9@$#/.-])(?:[₿₦₮₱₴₣₲₡₭](?=[{_L}]{{3}})|0(?=[{_L}]{{3,}}(?![{_L}0-9]))(?!day)|[a-z]{{2,3}}(?:33|00)(?![{_L}0-9.,:%]))"
)
_LEET = dict(zip(map(ord, f"013457@$!|{_SIGNS}"), "oieastasilelcybntpsfgckcr", strict=True))
_UNLEET_SYMBOL = re.compile(r"[@!|]")
_NUMBER = re.compile(r"0[13457]|1[03457]|3[01457]|4[0137]|5[0137]|7[0134]")
_VOWELS = frozenset("aeiou")
_TERMS = frozenset({"w3c", "h1b", "p4p", "c4d", "s3t", "l3d"})


def read_leet(text: str) -> tuple[str, int]:
    """Digits and signs that stand for letters inside words, read; marks inside words dropped; how many."""
    changed = 0

    def unleet(match: re.Match[str]) -> str:
        nonlocal changed
        word = match.group()
        plain = word.replace("11", "ll").translate(_LEET)
        swapped = sum(map(ne, word, plain))
        if not _is_leet(word, len(word) - swapped):
            return word
        changed += swapped
        return plain

    def unmark(match: re.Match[str]) -> str:
        nonlocal changed
        start, end = match.span()
        # Between two letters of which one has another letter beside it: x*y is arithmetic.
        inside = start and _LETTER.match(text, start - 1)
        if not inside or not ((start > 1 and _LETTER.match(text, start - 2)) or _LETTER.match(text, end + 1)):
            return match.group()
        changed += 1
        return ""

    if "*" in text or "~" in text or "^" in text or "`" in text or "\u00b7" in text or "\u2022" in text:
        text = _MARKS_BEFORE.sub(unmark, text)
    return _LEET_WORD.sub(unleet, text), changed


def read_edges(text: str) -> tuple[str, int]:
    """Leet at the edge of a word: ``0ffer``, ``fr33``; how many such words."""
    return _LEET_EDGE.subn(lambda m: m.group().translate(_LEET), text)


def _is_leet(word: str, letters: int) -> bool:
    """Whether the odd characters stand for letters; ``h2o``, ``w3c`` and ``yes|no`` are what they are."""
    if letters < 2 or letters < len(word) - letters:
        return False
    if "!" in word or "@" in word or "|" in word:
        parts = [len(part) for part in _UNLEET_SYMBOL.split(word)]
        if min(parts) >= (2 if "|" in word else 3) or (parts[0] >= 3 and parts[-1] <= 1):
            return False
    if len(word) - letters > 1 and _NUMBER.search(word):
        return False
    if letters == 2:
        return (
            len(word) == 3 and word[1] in "0134@!" and not _VOWELS & {word[0], word[2]} and word not in _TERMS
        )
    return word not in _TERMS


# --- repeats ------------------------------------------------------------------------------------------------

_ZEROS = re.compile(rb"\0\0+")


def alike(text: str) -> bytes:
    """One byte a character, 0 where it equals the one before it (one integer xor: no loop over
    characters)."""
    if text.isascii():
        raw = int.from_bytes(text.encode(), "big")
        return (raw ^ (raw >> 8)).to_bytes(len(text), "big")
    raw = int.from_bytes(text.encode("utf-32-be", "surrogatepass"), "big")
    wide = (raw ^ (raw >> 32)).to_bytes(4 * len(text), "big")
    # A character's four bytes are 0 all together, or its lowest two are not 0 together.
    low, high = wide[3::4], wide[2::4]
    both = int.from_bytes(low, "big") | int.from_bytes(high, "big") | int.from_bytes(wide[1::4], "big")
    return both.to_bytes(len(text), "big")


def squeeze(text: str) -> str:
    """Two of a kind for three or more, but digits stay, and AAA, www and the like are words of their own."""
    pieces, done = [], 0
    for zeros in _ZEROS.finditer(alike(text)):
        start, end = zeros.start() - 1, zeros.end()
        kind = text[start]
        if kind.isspace() or kind.isdecimal():
            continue
        if end - start == 3 and kind.isalpha() and _is_short(text, start, end):
            continue
        pieces.append(text[done : start + 2])
        done = end
    return "".join((*pieces, text[done:])) if pieces else text


def _is_short(text: str, start: int, end: int) -> bool:
    """Whether a letter three times, and at most one more after it, is the whole word."""
    if start and _LETTER.match(text, start - 1):
        return False
    after = end + 1 if _LETTER.match(text, end) else end
    return _LETTER.match(text, after) is None

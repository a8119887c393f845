"""Runs the stages of the canonical form until nothing changes, and only those that a text may need.

Most messages need none: their bytes, mapped to a few classes, hold none of the pairs that any stage looks
for. That screening is a handful of C calls a message (`_stages`); what it lets through is lower-cased and
done. `redqueen.text.batch` does the same for many messages at once.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from redqueen.text import links, words
from redqueen.text.folding import SIGNS, fold, fold_ascii

MAX_PASSES = 7
"""Passes after which text that still changes is cut down to bare letters; honest text needs one or two."""


class Reading(NamedTuple):
    """One message, read once: canonical form and the share in [0, 1] of it that had been obscured."""

    canonical: str
    obfuscation: float


def canonicalise(text: str) -> str:
    """The canonical form of any string. Idempotent, linear time, never raises (lone surrogates go)."""
    return read(text).canonical


def obfuscation(text: str) -> float:
    """Share in [0, 1] of visible characters that had to be changed, apart from case, punctuation, repeats."""
    return read(text).obfuscation


def read(text: str) -> Reading:
    """Canonical form and obfuscation together, for callers that want both, at half the price."""
    return finish(text, text, 0, MAX_PASSES)


def finish(text: str, current: str, changed: int, passes: int) -> Reading:
    """What becomes of `text`, of which `current` is left after some passes that changed so many
    characters."""
    for _ in range(passes):
        following, more, settled = one_pass(current)
        if following == current:
            break
        current = following
        changed += more
        if settled:
            break
    else:
        current = _calmed(current)
    return measured(text, current, changed)


def measured(text: str, canonical: str, changed: int) -> Reading:
    """The reading of a text with so many characters changed."""
    if not changed:
        return Reading(canonical, 0.0)
    visible = len(text) - text.count(" ") - text.count("\n") - text.count("\t")
    return Reading(canonical, min(1.0, changed / max(1, visible)))


LINK, SPELT, LEET, EDGE, REPEATS, URL = 1, 2, 4, 8, 16, 32
WORDS = SPELT | LEET | EDGE | REPEATS


def one_pass(text: str) -> tuple[str, int, bool]:
    """One pass: text, characters changed, whether nothing is left to do (another pass would find the
    same)."""
    if text.isascii():
        folded, changed = fold_ascii(text)
        settled = True
    else:
        folded, changed, settled = fold(text)
    # Screened as it will be in the end; what is done depends on the blanks as they are.
    tidy = folded
    if "  " in folded or not folded.isprintable() or folded[:1] == " " or folded[-1:] == " ":
        tidy = " ".join(folded.split())
    return staged(folded, tidy, _stages(tidy), changed, settled)


def staged(folded: str, tidy: str, stages: int, changed: int, settled: bool) -> tuple[str, int, bool]:
    """The rest of a pass: what the folded text (`tidy`: the same with single blanks) may need of links and
    words."""
    if not stages:
        return tidy, changed, settled
    text = folded
    if stages & LINK:
        text, more = links.refang(text)
        changed += more
    if stages & WORDS:
        text, more = _around_links(text, stages) if stages & (URL | LINK) else _words(text, stages)
        changed += more
    text = " ".join(text.split())
    return text, changed, settled and text == tidy == folded


def _around_links(text: str, stages: int) -> tuple[str, int]:
    pieces: list[str] = []
    done = changed = 0
    for start, end in links.spans(text):
        piece, more = _words(text[done:start], stages)
        pieces += (piece, text[start:end])
        changed += more
        done = end
    piece, more = _words(text[done:], stages)
    return "".join((*pieces, piece)), changed + more


def _words(text: str, stages: int) -> tuple[str, int]:
    changed = 0
    if stages & SPELT:
        text, changed = words.join_spelt(text)
    if stages & LEET:
        text, more = words.read_leet(text)
        changed += more
    if stages & EDGE:
        text, more = words.read_edges(text)
        changed += more
    return (words.squeeze(text) if stages & REPEATS else text), changed


# --- screening: which stages a text may need, never too few -------------------------------------------------


def _table(classes: dict[str, str]) -> bytes:
    """Bytes to classes; letters, and every character outside ASCII, are `a`, what is not named is a blank."""
    table = bytearray(b" " * 128 + b"a" * 128)
    for name, members in classes.items():
        for member in members:
            table[ord(member)] = ord(name)
    return bytes(table)


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SHAPE = _table({"a": _LETTERS, "0": "013457@$!|", "*": "*~^`", "_": "_", ".": ".", "(": "[({<%\\:"})
_PARTED = _table({"a": _LETTERS, "0": "0123456789", ".": "@$`%"})
_CONTINUATION = bytes(range(0x80, 0xC0))
_INNER = re.compile(r"a\*{1,3}a")
_FOUR = re.compile("(?<![a0])a a a a")
_LOOSE_DOT = re.compile(r" \.\s?[cngorx]")
_BRACKETED_DOT = re.compile(r"[\[({<] ?\.")
_SIGN = re.compile(rf"[{SIGNS}][a-z\x80-\U0010ffff]")


def _stages(text: str) -> int:
    """The stages that folded text may need."""
    stages = 0
    raw = text.encode()
    if text.isascii():
        shape, parted = raw.translate(_SHAPE).decode(), raw.translate(_PARTED).decode()
    else:
        shape = raw.translate(_SHAPE, _CONTINUATION).decode()
        parted = raw.translate(_PARTED, _CONTINUATION).decode()
        if _SIGN.search(text):
            stages = LEET | EDGE
        if "\u00b7" in text or "\u2022" in text:
            stages |= SPELT | LEET
    if "0a" in shape:
        if "a0a" in shape or "a00a" in shape or "a000a" in shape:
            stages |= LEET
        if "0aaa" in shape:
            stages |= EDGE
        if "d0t" in text:
            stages |= LINK
    if "a*" in shape and _INNER.search(shape):
        stages |= LEET
    if "a00" in shape and ("33" in text or "00" in text):
        stages |= EDGE
    if "a a a" in parted and (
        "*a*a" in shape
        or "_a_a" in shape
        or ("a a a a" in parted and (not text.isascii() or _FOUR.search(parted)))
    ):
        stages |= SPELT
    if "  a  a" in parted and ("a  a  a  a" in parted or "a   a   a   a" in parted):
        stages |= SPELT
    if "\0\0" in words.alike(text).decode("latin-1"):
        stages |= REPEATS
    if ".a" in shape:
        stages |= URL
    if "dot" in text or "xn--" in text or (" ." in text and _LOOSE_DOT.search(text)):
        stages |= LINK
    return stages | cloaks(text) if "(" in shape else stages


def cloaks(text: str) -> int:
    """The stages that a text with a bracket, a colon, a percent sign or a backslash may need."""
    if "http" in text:
        return LINK | URL
    if (
        "hxxp" in text or "h**p" in text or "%" in text or "[:" in text or "[/" in text or "](" in text
        or _BRACKETED_DOT.search(text)
    ):  # fmt: skip
        return LINK
    return 0


def _calmed(text: str) -> str:
    """Text built to keep changing, with the words that do cut down to bare letters; all of it only where that
    does not help, or one such word would take the rest of its message along.
    """
    kept = " ".join(word if one_pass(word)[0] == word else _bare(word) for word in text.split())
    return kept if one_pass(kept)[0] == kept else _bare(text)


def _bare(text: str) -> str:
    """Last resort: letters alone, no more than two of a kind in a row."""
    letters = "".join(c for c in text if c.isalpha())
    for _ in range(MAX_PASSES):
        folded = words.squeeze(fold(letters)[0])
        folded = "".join(c for c in folded if c.isalpha())
        if folded == letters:
            return letters
        letters = folded
    return "".join(c for c in letters if "a" <= c <= "z")


def domains(text: str) -> list[str]:
    """Host names in the text, lower case, without ``www.``, each once, in order; cloaks are seen through.

    Hosts behind a user name (``https://discord.com@evil.example``) are the ones that would be visited. A bare
    host (without ``http``) counts only under a known top-level domain, so that "ok.then" is not one.
    """
    small = text.lower()
    if text.isascii() and not any(hint in small for hint in (".", "dot", "d0t", "%", "://")):
        return []
    for _ in range(MAX_PASSES):
        folded = fold_ascii(text)[0] if text.isascii() else fold(text)[0]
        shown = links.refang(folded)[0]
        if shown == text:
            break
        text = shown
    return links.hosts(text)

"""Reading a message the way a person would: canonical form, what it took to get there, fingerprint, domains.

Belongs here: pure functions of one string. Does not belong here: anything that knows an actor, a time or a
model (see `redqueen.features`), and ways of *making* obfuscated text (see `redqueen.attacks`).

The canonical form is a second view beside the raw text, never a replacement: a look-alike domain such as
``discоrd.gift`` becomes readable in it, and the fact that it had to be changed is `obfuscation`.

Rules of the canonical form, in the order in which they run until nothing changes any more:

1. invisible, bidi, tag and control characters go (joiners that a script needs stay); NFKC; typographic quotes
   and dashes become plain; free combining marks go (accents that compose, é, ü, й, stay);
2. look-alikes become Latin letters, but only in a word that mixes scripts; whole Cyrillic, Greek, Armenian...
   words stay what they are; casefold;
3. links are refanged (``hxxp``, ``[.]``, ``(dot)``) and unwrapped (markdown, redirects, percent-encoded
   letters), and are then left alone by what follows;
4. letters with one separator between each are joined (``f r e e``, ``f.r.e.e``: four letters or more, so that
   ``u.s.a.`` stays); leet inside words with letters is read; three of a kind or more become two (but not
   in a word as short as ``aaa``); white space becomes one blank.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from urllib.parse import unquote

import numpy as np

__all__ = ["Reading", "canonicalise", "domains", "hamming", "obfuscation", "read", "simhash"]

MAX_PASSES = 6
"""Passes after which text that still changes is cut down to bare letters; honest text needs one or two."""


@dataclass(frozen=True, slots=True)
class Reading:
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
    current, changed, settled = _one_pass(text)
    if settled:
        return Reading(current, 0.0)
    for _ in range(MAX_PASSES):
        following, more, _settled = _one_pass(current)
        changed += more
        if following == current:
            break
        current = following
    else:
        current = _bare(current)
    visible = len(text) - sum(map(text.count, " \n\t"))
    return Reading(current, min(1.0, changed / max(1, visible)))


def _one_pass(text: str) -> tuple[str, int, bool]:
    """One pass: text, characters changed, whether nothing but case changed (a second then finds the same)."""
    before = text
    if before.isascii():
        text = before.lower()
        if not text.isprintable():
            text = _ASCII_CONTROL.sub("", text)
        changed, settled = 0, len(text) == len(before)
    else:
        text, changed, settled = _fold(before)
    folded = text
    if _may_hold_link(text) and _LINKISH.search(text):
        text, more = _refang(text)
        changed += more
    if "." in text and _URL.search(text):
        text, more = _around_links(text)
    else:
        text, more = _words(text)
    text = " ".join(text.split())
    return text, changed + more, settled and text == folded


def _bare(text: str) -> str:
    """Last resort for text built to keep changing: letters alone, no more than two of a kind in a row."""
    letters = "".join(c for c in text if c.isalpha())
    for _ in range(MAX_PASSES):
        folded = _REPEATS.sub(_squeeze, _fold(letters)[0])
        folded = "".join(c for c in folded if c.isalpha())
        if folded == letters:
            return letters
        letters = folded
    return "".join(c for c in letters if "a" <= c <= "z")


# --- 1. and 2.: characters ----------------------------------------------------------------------------------

_ASCII_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")
_CONTROL = r"\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff"
_JOINERS = r"\u200c\u200d\u180b-\u180d\u180f"
_JOINING_SCRIPTS = r"\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18aa\u1a20-\u1aad\ua8e0-\ua8ff"
_UNSEEN = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_INVISIBLE = re.compile(
    f"[{_UNSEEN}{_CONTROL}]|(?<![{_JOINING_SCRIPTS}])[{_JOINERS}]|[{_JOINERS}](?![{_JOINING_SCRIPTS}])"
)
# Invisible characters that nobody's keyboard produced: inside a Latin, Greek or Cyrillic word, bidi overrides
# in text without a right-to-left letter, tags without a flag. A joiner in an emoji is how emoji are written.
_ALPHABETIC = r"a-z\u00df-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u052f\u1e00-\u1fff"
_WORDY = r"A-Z0-9\u00c0-\u00d6" + _ALPHABETIC
_SMUGGLED = re.compile(f"(?<=[{_WORDY}])[{_UNSEEN}{_JOINERS}{_CONTROL}]+(?=[{_WORDY}])")
_OVERRIDES = re.compile(r"[\u202a-\u202e\u2066-\u2069]")
_RIGHT_TO_LEFT = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
_TAGS = re.compile("[\U000e0020-\U000e007f]")
_FLAG = "\U0001f3f4"

# Letters that only exist to look like other letters (mathematical, enclosed, superscript): nobody types them
# by accident. Fullwidth ones are ordinary beside CJK text, superscript digits and circled numbers everywhere.
_FANCY = re.compile(
    "[\u02b0-\u02b8\u1d2c-\u1d6a\u2071\u207f\u2090-\u209c\u2102\u210a-\u2115\u2118-\u211d\u2124\u2128\u212c-\u2138"
    "\u249c-\u24e9\U0001d400-\U0001d7ff\U0001f110-\U0001f169\U0001f170-\U0001f189]"
)
_FULLWIDTH = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uff66-\uff9d]")
_GENERIC = "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f\u0483-\u0489"
_GENERIC_MARKS = re.compile(f"[{_GENERIC}]+")
_OVERLAYS = re.compile("[\u0334-\u0338\u0489\u20d0-\u20e2\u20e4-\u20f0]")
_PUNCTUATION = {
    **dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u2032\u02bc"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u2033"), '"'),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63"), "-"),
    0x2044: "/", 0x2215: "/", 0x2024: ".", 0x2236: ":", 0xA789: ":",
}  # fmt: skip
_IDEOGRAPHIC_DOT = re.compile("(?<=[A-Za-z0-9])\u3002(?=[A-Za-z0-9])")
_PUNCTUATED = re.compile("[" + "".join(map(chr, _PUNCTUATION)) + "]")
_TOKEN = re.compile(r"\w+")


def _fold(text: str) -> tuple[str, int, bool]:
    """Non-ASCII text to casefolded NFKC without anything unseen; how many characters had been tampered with;
    and whether nothing but case changed."""
    before, changed, table = text, 0, _characters()
    if _INVISIBLE.search(text):
        text, changed = _reveal(text)
    if marked := table.marks.search(text) is not None:
        changed += len(_OVERLAYS.findall(text))
        # Before NFKC, because sorting a long run of marks takes quadratic time.
        text = table.stacks.sub(r"\1", text)
    if not unicodedata.is_normalized("NFKC", text):
        changed += len(_FANCY.findall(text))
        if _FULLWIDTH.search(text) and not _CJK.search(text):
            changed += len(_FULLWIDTH.findall(text))
        text, marked = unicodedata.normalize("NFKC", text), True
    if _PUNCTUATED.search(text):
        text = text.translate(_PUNCTUATION)
    if marked:
        # One free mark on a letter is somebody's orthography; a stack, or one from another script, is not.
        changed += sum(len(run) - 1 for run in _GENERIC_MARKS.findall(text))
        text, strays = table.stray.subn("", _GENERIC_MARKS.sub("", text))
        changed += strays
    if table.disguised.search(text):
        changed += len(table.disguised.findall(text))
        text = text.translate(table.always)
    if table.seam.search(text):
        text, more = _unmix(text, table)
        changed += more
    if "\u3002" in text:
        text = _IDEOGRAPHIC_DOT.sub(".", text)
    folded = text.casefold()
    settled = text == before and len(folded) == len(text) and unicodedata.is_normalized("NFKC", folded)
    return folded, changed, settled


def _reveal(text: str) -> tuple[str, int]:
    changed = len(_SMUGGLED.findall(text))
    if _OVERRIDES.search(text) and not _RIGHT_TO_LEFT.search(text):
        changed += len(_OVERRIDES.findall(text))
    if _FLAG not in text:
        changed += len(_TAGS.findall(text))
    return _INVISIBLE.sub("", text), changed


def _unmix(text: str, table: _Characters) -> tuple[str, int]:
    changed = 0

    def latin(match: re.Match[str]) -> str:
        nonlocal changed
        word = match.group()
        if word.isascii():
            return word
        plain = word.translate(table.mixed)
        alike = sum(a != b for a, b in zip(word, plain, strict=True))
        ascii_letters = sum(c.isascii() and c.isalpha() for c in word)
        if not alike or not ascii_letters:
            return word
        foreign = sum(not c.isascii() and c.isalpha() and not "\xc0" <= c <= "\u024f" for c in word)
        if ascii_letters <= foreign and sum(c in table.certain for c in word) < foreign:
            return word
        changed += alike
        return plain

    return _TOKEN.sub(latin, text), changed


@dataclass(frozen=True)
class _Characters:
    """Tables from Unicode's confusables and categories, built at the first non-ASCII message (some 60 ms)."""

    mixed: dict[int, str]
    certain: frozenset[str]
    seam: re.Pattern[str]
    always: dict[int, str]
    disguised: re.Pattern[str]
    marks: re.Pattern[str]
    stacks: re.Pattern[str]
    stray: re.Pattern[str]


_MIXABLE = frozenset(
    {"CYRILLIC", "GREEK", "COPTIC", "ARMENIAN", "CHEROKEE", "LISU", "CANADIAN", "DESERET", "WARANG",
     "GEORGIAN", "RUNIC", "TIFINAGH", "OSAGE", "LATIN"}
)  # fmt: skip
# Alike enough for a reader in the middle of a Latin word, though Unicode does not list them as confusable.
_ALSO_ALIKE = {
    **dict(zip("вкмнтгпияшўїєё", "bkmhtrnurwyiee", strict=True)),
    **dict(zip("ηωτκεβχυμπ", "nwtkebxuun", strict=True)),
    **dict(zip("ɡɑɩɪʏɛǝ", "gaiiyee", strict=True)),
}


@cache
def _characters() -> _Characters:
    certain, always = _confusables()
    mixed = {**certain, **{c: p for c, p in _with_capitals(_ALSO_ALIKE).items() if c not in certain}}
    odd = _class(map(ord, mixed))
    marks = _class(i for i in range(0x300, 0x1E944) if unicodedata.category(chr(i)) in ("Mn", "Me"))
    return _Characters(
        mixed={ord(k): v for k, v in mixed.items()},
        certain=frozenset(certain),
        seam=re.compile(f"[A-Za-z][{odd}]|[{odd}][A-Za-z]"),
        always={ord(k): v for k, v in always.items()},
        disguised=re.compile("[" + _class(map(ord, always)) + "]"),
        marks=re.compile(f"[{marks}]"),
        stacks=re.compile(f"([{marks}]{{4}})[{marks}]+"),
        stray=re.compile(f"(?<=[A-Za-z0-9])[{marks}]+"),
    )


def _confusables() -> tuple[dict[str, str], dict[str, str]]:
    """(read as Latin in a word that mixes scripts, read as Latin anywhere): characters to small ASCII."""
    from confusable_homoglyphs.confusables import confusables_data  # type: ignore[import-untyped]

    mixed: dict[str, str] = {}
    for plain in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        for entry in confusables_data.get(plain, ()):
            odd = entry["c"]
            if len(odd) == 1 and ord(odd) > 0x17F and unicodedata.name(odd, "?").split()[0] in _MIXABLE:
                # l, I and 1 are one class in Unicode's data: a capital of it is an I, a small one an l.
                letter = "i" if plain == "l" and odd.isupper() else plain.lower()
                mixed.setdefault(odd, letter)
    always = {"\u212e": "e"}
    for code in (*range(0x250, 0x2B0), *range(0x1D00, 0x1D2C), *range(0xA730, 0xA732), 0xA7AF, 0xA7EE):
        words = unicodedata.name(chr(code), "").split()
        if words[:4] == ["LATIN", "LETTER", "SMALL", "CAPITAL"] and len(words) == 5 and len(words[4]) == 1:
            always[chr(code)] = words[4].lower()
    always |= {chr(first + i): chr(97 + i) for first in (0x1F150, 0x1F170) for i in range(26)}
    return _with_capitals(mixed), _with_capitals(always)


def _with_capitals(table: dict[str, str]) -> dict[str, str]:
    """The table and what casefolds into it, so that a second pass reads no character differently."""
    found = dict(table)
    for code in range(0x80, 0x1E944):
        small = chr(code).casefold()
        if small in table:
            found.setdefault(chr(code), table[small])
    return found


def _class(codes: Iterable[int]) -> str:
    """The inside of a regular expression's character class, as ranges."""
    spans: list[list[int]] = []
    for code in sorted(set(codes)):
        if spans and spans[-1][1] == code - 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in spans)


# --- 3.: links ----------------------------------------------------------------------------------------------

_COMMON_TLD = (
    "com|net|org|info|biz|io|gg|gift|gifts|ru|xyz|top|site|online|club|shop|store|app|dev|link|click|live|pro|vip|"
    "fun|win|icu|buzz|cyou|space|website|tech|cc|tv|ly|me|co|us|uk|de|fr|nl|eu|pl|ua|cn|br|in|ca|au|jp|kr|es|ch|se|"
    "tk|ml|ga|cf|gq|pw|ws|su|cz|lol|monster|world|today|life|news|one|page|cloud|games|game|money|finance|exchange|"
    "trade|bet|casino|loan|download|stream|chat|email|support|help|edu|gov|mil|int|example|test|invalid|ro|hu|gr|pt|"
    "dk|fi|no|ie|nz|za|mx|ar|cl|tr|ir|il|sg|hk|tw|vn|th|ph|id|my|to|ai|sh|st|la|bz|im|is|it|at|be|by|kz|ge|am|lt|lv|ee"
)
_TOP = rf"(?:{_COMMON_TLD}|xn--[a-z0-9-]{{2,59}})(?![a-z0-9_-]|\.[a-z0-9])"
_HOST = rf"(?:[a-z0-9][a-z0-9_-]{{0,62}}\.){{1,6}}{_TOP}"
_URL = re.compile(rf"(https?://[^\s<>\"]+|(?<![a-z0-9_.-]){_HOST}(?::\d{{1,5}})?(?:[/?#][^\s<>\"]*)?)")
_LINKISH = re.compile(
    r"hxxp|h\*\*p|[\[({] ?(?:\.|dot) ?[\])}]|\[:\]|\[/\]|%[0-9a-f]{2}|\]\(\s?http|<http"
    r"| ?\bdot (?:com|net|org|ru|gg|gift|xyz|io)\b"
    r"|[a-z0-9] \.\s?(?:com|net|org|ru|gg|gift|xyz)\b|=https?://|https?:\s|https?:/[^/]"
)
_SCHEME = re.compile(r"h(?:xx|\*\*|tt)p(s?)(?:\[:\]|:)\s{0,2}(?:\[/\]|/){1,4}\s?")
_DOT = re.compile(r"(?<=[a-z0-9]) ?[\[({] ?(?:\.|dot) ?[\])}] ?(?=[a-z0-9])")
_SPELT_DOT = re.compile(r"(?<=[a-z0-9]) (?:dot |\.\s?)(?=(?:com|net|org|ru|gg|gift|xyz|io)\b)")
_MARKDOWN = re.compile(r"\[([^\[\]\n]{0,200})\]\(\s?(https?://[^\s()<>]*)\s?\)")
_ANGLE = re.compile(r"<(https?://[^\s<>]*)>")
_REDIRECT = re.compile(
    r"https?://[^\s<>\"=]*(?:=(?!https?(?::|%3a))[^\s<>\"=]*)*=(?=https?(?::|%3a)(?:/|%2f){2})"
)
_ESCAPED_TWICE = re.compile(r"%(?:25)+(?=[0-9a-f]{2})")
_ESCAPED = re.compile(r"%(?:2[def]|3[0-9]|4[1-9a-f]|5[0-9af]|6[1-9a-f]|7[0-9ae])")
_ESCAPED_INNER = re.compile(r"(https?)(?::|%3a)(?:/|%2f){2}")


def _may_hold_link(text: str) -> bool:
    """Cheap and never wrong when it says no: plain substring tests cost a tenth of the regular expression."""
    return (
        "http" in text or " ." in text or "dot" in text or "[" in text or "(" in text or "{" in text
        or "%" in text or "hxxp" in text or "h**p" in text
    )  # fmt: skip


def _refang(text: str) -> tuple[str, int]:
    """Links as they would be clicked, and how many of their characters had been cloaked."""
    before = text
    text, spelt = _SPELT_DOT.subn(".", text)
    text, dots = _DOT.subn(".", text)
    text = _SCHEME.sub(r"http\1://", text)
    schemes = 4 * (before.count("hxxp") + before.count("h**p"))
    text = _ANGLE.sub(r" \1 ", _MARKDOWN.sub(r"\1 \2 ", text))
    escaped = 0
    if "%" in text and "http" in text:
        text = _ESCAPED_TWICE.sub("%", text)
        text, escaped = _ESCAPED.subn(lambda m: unquote(m.group()).lower(), text)
        text = _ESCAPED_INNER.sub(r"\1://", text)
    text, redirects = _REDIRECT.subn("", text)
    return text, 3 * (spelt + dots) + schemes + escaped + 8 * redirects


def _around_links(text: str) -> tuple[str, int]:
    changed = 0
    pieces = _URL.split(text)
    for i in range(0, len(pieces), 2):
        if pieces[i]:
            pieces[i], more = _words(pieces[i])
            changed += more
    return "".join(pieces), changed


def domains(text: str) -> list[str]:
    """Host names in the text, lower case, without ``www.``, each once, in order; cloaks are seen through.

    Hosts behind a user name (``https://discord.com@evil.example``) are the ones that would be visited. A bare
    host (without ``http``) counts only under a known top-level domain, so that "ok.then" is not one.
    """
    if "." not in text and "dot" not in text.lower() and "\u3002" not in text and "%" not in text:
        return []
    text = text.lower() if text.isascii() else _fold(text)[0]
    if _may_hold_link(text) and _LINKISH.search(text):
        text = _refang(text)[0]
    return hosts(text)


def hosts(canonical: str) -> list[str]:
    """`domains` of text that is canonical already."""
    if "." not in canonical:
        return []
    found: dict[str, None] = {}
    for url in _URL.findall(canonical):
        rest = url.split("://", 1)[-1]
        host = re.split(r"[/?#\\]", rest, maxsplit=1)[0].rsplit("@", 1)[-1]
        host = host.split(":", 1)[0].strip(".,;!)('\"]")
        if host.startswith("www."):
            host = host[4:]
        if "." in host:
            found[host] = None
    return list(found)


# --- 4.: words ----------------------------------------------------------------------------------------------

_L = _ALPHABETIC
_SPELT_OUT = re.compile(
    rf"(?<![{_L}0-9])[{_L}](?:([ \n])[{_L}](?:\1[{_L}]){{2,}}"
    rf"|([.\-_*~/\\,+|'\"^=\u00b7\u2022])[{_L}](?:\2[{_L}]){{2,}})"
    rf"(?![{_L}0-9])"
)
_SEPARATOR = r"[ \n.\-_*~/\\,+|'\"^=\u00b7\u2022]"
_EVERY_OTHER = re.compile(rf"({_SEPARATOR})\1\1")
_MARK = r"[*~^`\u00b7\u2022]"
_INNER_MARK = re.compile(
    rf"(?<=[{_L}][{_L}]){_MARK}{{1,3}}(?=[{_L}])|(?<=[{_L}]){_MARK}{{1,3}}(?=[{_L}][{_L}])"
)
_LEETISH = re.compile(rf"[013457@$!|\u20ac*~^`\u00b7\u2022][{_L}]|33|00")
_LEET_WORD = re.compile(
    rf"(?<![{_L}0-9@$!|\u20ac])[0134@$]?[{_L}]+(?:[013457@$!|\u20ac]{{1,3}}[{_L}]+)+[013457$]{{0,3}}(?![{_L}0-9])"
)
_LEET_EDGE = re.compile(
    rf"(?<![{_L}0-9@$#/.-])(?:0(?=[{_L}]{{3,}}(?![{_L}0-9]))(?!day)|[a-z]{{2,3}}(?:33|00)(?![{_L}0-9.,:%]))"
)
_LEET = {ord(a): b for a, b in zip("013457@$!|\u20ac", "oieastasile", strict=True)}
_UNLEET_SYMBOL = re.compile(r"[@!|]")
_NUMBER = re.compile(r"0[13457]|1[03457]|3[01457]|4[0137]|5[0137]|7[0134]")
_REPEATS = re.compile(r"([^\d\s])\1{2,}")
_SHORT = re.compile(rf"(?:^|[^{_L}])([{_L}])\1\1[{_L}]?(?![{_L}])")
_VOWELS = frozenset("aeiou")


def _words(text: str) -> tuple[str, int]:
    changed = 0
    # A separator between every two letters is a run of separators in every other character.
    if _EVERY_OTHER.search(text[::2]) or _EVERY_OTHER.search(text[1::2]):
        text, changed = _join_spelt(text)
    if _LEETISH.search(text):
        text, more = _read_leet(text)
        changed += more
    return _REPEATS.sub(_squeeze, text), changed


def _squeeze(match: re.Match[str]) -> str:
    """Two of a kind for three or more, but AAA, www and the like are words of their own."""
    if match.end() - match.start() == 3 and _SHORT.match(match.string, max(0, match.start() - 1)):
        return match.group()
    return match.group(1) * 2


def _join_spelt(text: str) -> tuple[str, int]:
    changed = 0

    def join(match: re.Match[str]) -> str:
        nonlocal changed
        word = match.group()[::2]
        changed += len(word)
        return word

    return _SPELT_OUT.sub(join, text), changed


def _read_leet(text: str) -> tuple[str, int]:
    text, changed = _INNER_MARK.subn("", text)

    def unleet(match: re.Match[str]) -> str:
        nonlocal changed
        word = match.group()
        plain = word.translate(_LEET)
        swapped = sum(a != b for a, b in zip(word, plain, strict=True))
        if not _is_leet(word, len(word) - swapped):
            return word
        changed += swapped
        return plain

    text = _LEET_WORD.sub(unleet, text)
    text, more = _LEET_EDGE.subn(lambda m: m.group().translate(_LEET), text)
    return text, changed + more


def _is_leet(word: str, letters: int) -> bool:
    """Whether the odd characters stand for letters; ``h2o``, ``w3c`` and ``yes|no`` are what they are."""
    if letters < 2 or letters < len(word) - letters:
        return False
    if _UNLEET_SYMBOL.search(word):
        parts = [len(part) for part in _UNLEET_SYMBOL.split(word)]
        if min(parts) >= (2 if "|" in word else 3) or (parts[0] >= 3 and parts[-1] <= 1):
            return False
    if _NUMBER.search(word):
        return False
    if letters == 2:
        return (
            len(word) == 3 and word[1] in "0134@!" and not _VOWELS & {word[0], word[2]} and word not in _TERMS
        )
    return word not in _TERMS


_TERMS = frozenset({"w3c", "h1b", "p4p", "c4d", "s3t", "l3d"})


# --- fingerprints -------------------------------------------------------------------------------------------

_MIX_A = np.uint64(0x9E3779B97F4A7C15)
_MIX_B = np.uint64(0xBF58476D1CE4E5B9)


def simhash(canonical: str) -> int:
    """Signed 64-bit fingerprint: near-duplicates differ in few bits (see `hamming`), others in about 32.

    Every four bytes of the UTF-8 form are one shingle; each bit is the majority of the shingles' hashes.
    Stable across processes and machines. Empty text gives 0.
    """
    raw = np.frombuffer(canonical.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.uint64)
    if raw.size == 0:
        return 0
    if raw.size < 4:
        raw = np.pad(raw, (0, 4 - raw.size))
    mixed = raw[:-3] | raw[1:-2] << np.uint64(8) | raw[2:-1] << np.uint64(16) | raw[3:] << np.uint64(24)
    mixed = (mixed + _MIX_A) * _MIX_B
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MIX_A
    mixed ^= mixed >> np.uint64(32)
    bits = np.unpackbits(mixed.astype("<u8").view(np.uint8)).reshape(mixed.size, 64)
    majority = 2 * bits.sum(axis=0, dtype=np.int64) > mixed.size
    return int.from_bytes(np.packbits(majority).tobytes(), "little", signed=True)


def hamming(a: int, b: int) -> int:
    """How many of the 64 bits of two fingerprints differ (0 to 64)."""
    return ((a ^ b) & 0xFFFF_FFFF_FFFF_FFFF).bit_count()

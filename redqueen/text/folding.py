"""Rules 1 and 2 of the canonical form: the characters themselves.

What a character may need is looked up once a character (`_Kinds`), so that a message pays only for the stages
that one of its characters asks for; most non-ASCII text asks for none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from functools import cache
from operator import ne

_CONTROL = r"\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff"
_JOINERS = r"\u200c\u200d\u180b-\u180d\u180f"
_JOINING_SCRIPTS = r"\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18aa\u1a20-\u1aad\ua8e0-\ua8ff"
_UNSEEN = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffc\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff"
)
_INVISIBLE = re.compile(f"[{_UNSEEN}{_CONTROL}]+")
_LOOSE_JOINER = re.compile(
    f"(?<![{_JOINING_SCRIPTS}])[{_JOINERS}]+|[{_JOINERS}]+(?![{_JOINING_SCRIPTS}{_JOINERS}])"
)
# Invisible characters that nobody's keyboard produced: inside a Latin, Greek or Cyrillic word, bidi overrides
# in text without a right-to-left letter, tags without a flag. A joiner in an emoji is how emoji are written.
ALPHABETIC = r"a-z\u00df-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u052f\u1e00-\u1fff"
"""Letters of Latin, Greek and Cyrillic, small ones among ASCII and Latin-1: the inside of a character
class."""
_WORDY = r"A-Z0-9\u00c0-\u00d6" + ALPHABETIC
_UNSEEN_RUN = re.compile(f"[{_UNSEEN}{_JOINERS}{_CONTROL}]+")
WORDY_CHARACTERS = frozenset(re.findall(f"[{_WORDY}]", "".join(map(chr, range(0x2000)))))
_OVERRIDES = re.compile(r"[\u202a-\u202e\u2066-\u2069]")
_BACKWARDS = re.compile(rf"(?<![{_WORDY}])\u202e([^\u202a-\u202e\u2066-\u2069\n]*)")
_RIGHT_TO_LEFT = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
_TAGS = re.compile("[\U000e0020-\U000e007f]")
_FLAG = "\U0001f3f4"
# Flags are pairs of regional letters; letters that stand apart spell a word.
_REGIONAL = "[\U0001f1e6-\U0001f1ff]"
_REGIONAL_WORD = re.compile(
    rf"(?<!{_REGIONAL}){_REGIONAL}(?:[\s\u200b-\u200d\u2060\ufeff.\-]+{_REGIONAL})+(?!{_REGIONAL})"
)
_REGIONAL_LETTERS = {0x1F1E6 + i: chr(97 + i) for i in range(26)}

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
_STACK = re.compile(f"[{_GENERIC}]{{4,}}")
_OVERLAYS = re.compile("[\u0334-\u0338\u0489\u20d0-\u20e2\u20e4-\u20f0]")
_PUNCTUATION = {
    **dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u2032\u02bc"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u2033"), '"'),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63"), "-"),
    0x2044: "/", 0x2215: "/", 0x2024: ".", 0x2236: ":", 0xA789: ":", 0x2800: " ",
    0x2027: "\u00b7", 0x2219: "\u00b7", 0x22C5: "\u00b7",
}  # fmt: skip
_IDEOGRAPHIC_DOT = re.compile("(?<=[A-Za-z0-9])\u3002(?=[A-Za-z0-9])")
_ASCII = frozenset(map(chr, range(128)))
_ASCII_LETTERS = frozenset(c for c in _ASCII if c.isalpha())
_MIXED_WORD = re.compile(r"(?<!\w)[A-Za-z0-9_]*+[^\W\x00-\x7f]\w*+")
_WORD_WITHOUT_ASCII = re.compile(r"(?<!\w)(?=[0-9_]*+[^\W\x00-\x7f])[^\WA-Za-z]++(?!\w)")
_CAPITAL_FOR_SMALL = re.compile(r"(?<=[a-z][a-z])I{1,2}(?![A-Za-z0-9])|(?<=[a-z])II(?=[a-z])")
_ASCII_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")

SIGNS = "€·•£¢¥₿₦₮₱₴₣₲₡₭©®"
"""Signs outside ASCII that stand for letters or between them (see `words`)."""


class Need(IntFlag):
    """The stages that a character may ask for."""

    UNSEEN = 1
    JOINER = 2
    MARK = 4
    NORMAL = 8
    PUNCTUATION = 16
    DISGUISED = 32
    ALIKE = 64
    DOT = 128
    REGIONAL = 256
    BIDI = 512
    JOINING = 1024
    FANCY = 2048
    WIDE = 4096


def fold_ascii(text: str) -> tuple[str, int]:
    """ASCII text in small letters without control characters; how many characters had been tampered with."""
    text, changed = _capitals(text)
    text = text.lower()
    return (text if text.isprintable() else _ASCII_CONTROL.sub("", text)), changed


def _capitals(text: str) -> tuple[str, int]:
    if "I" not in text or text.count("I") == text.count(" I") + text.startswith("I"):
        return text, 0
    return _CAPITAL_FOR_SMALL.subn(lambda m: "l" * len(m.group()), text)


def fold(text: str) -> tuple[str, int, bool]:
    """Non-ASCII text to casefolded NFKC without anything unseen; how many characters had been tampered with;
    and whether folding the outcome again would find nothing to do."""
    before, table = text, characters()
    needs = table.kinds.of(text)
    text, changed = _capitals(text)
    if needs & ~Need.JOINING or not text.isprintable():
        text, more = _tamed(text, needs, table)
        changed += more
    folded = text.casefold()
    settled = (
        folded.isascii()
        or not table.kinds.of(folded) & ~Need.JOINING
        or (text == before and len(folded) == len(text) and unicodedata.is_normalized("NFKC", folded))
    )
    return folded, changed, settled


def _tamed(text: str, needs: int, table: Characters) -> tuple[str, int]:
    changed = 0
    if needs & Need.REGIONAL and _REGIONAL_WORD.search(text):
        changed += sum(map(len, _REGIONAL_WORD.findall(text)))
        text = _REGIONAL_WORD.sub(
            lambda m: "".join(filter(str.isalpha, m.group().translate(_REGIONAL_LETTERS))), text
        )
    if needs & (Need.UNSEEN | Need.JOINER) or not text.isprintable():
        text, more = _reveal(text, needs)
        changed += more
    if needs & Need.MARK:
        changed += len(_OVERLAYS.findall(text)) + sum(map(len, _STACK.findall(text)))
        text = _STACK.sub("", text)
        # Before NFKC, because sorting a long run of marks takes quadratic time.
        text = table.stacks.sub(r"\1", text)
    if needs & Need.NORMAL and not unicodedata.is_normalized("NFKC", text):
        if needs & Need.WIDE and not _CJK.search(text):
            changed += len(_FULLWIDTH.findall(text))
        if needs & Need.FANCY:
            odd = set(text) - _ASCII
            changed += sum(text.count(c) for c in odd if table.kinds[c] & Need.FANCY)
            text, _ = _replaced(text, odd, table.before)
        text = unicodedata.normalize("NFKC", text)
        needs = table.kinds.of(text)
    if needs & Need.PUNCTUATION:
        text, _ = _replaced(text, set(text) - _ASCII, _PUNCTUATION)
    if needs & Need.MARK:
        # One free mark on a letter is somebody's orthography; a stack, or one from another script, is not.
        changed += sum(len(run) - 1 for run in _GENERIC_MARKS.findall(text))
        text, strays = table.stray.subn("", _GENERIC_MARKS.sub("", text))
        changed += strays
    if needs & Need.DISGUISED:
        text, more = _replaced(text, set(text) - _ASCII, table.always)
        changed += more
    if needs & Need.ALIKE:
        text, more = _unmix(text, table)
        changed += more
    if needs & Need.DOT:
        text = _IDEOGRAPHIC_DOT.sub(".", text)
    return text, changed


def _reveal(text: str, needs: int) -> tuple[str, int]:
    changed = 0
    if needs & Need.BIDI:
        if not _RIGHT_TO_LEFT.search(text):
            changed += len(_OVERRIDES.findall(text))
            text, turned = _BACKWARDS.subn(lambda m: m[1][::-1], text)
            changed += turned
        if _FLAG not in text:
            changed += len(_TAGS.findall(text))
    pieces = _UNSEEN_RUN.split(text)
    for i in range(1, len(pieces)):
        before, after = pieces[i - 1], pieces[i]
        changed += before[-1:] in WORDY_CHARACTERS and after[:1] in WORDY_CHARACTERS
    if needs & Need.JOINER and needs & Need.JOINING:
        return _INVISIBLE.sub("", _LOOSE_JOINER.sub("", text)), changed
    return "".join(pieces), changed


def _unmix(text: str, table: Characters) -> tuple[str, int]:
    changed = 0
    mixed, certain = table.mixed, table.certain
    odd = set(text) - _ASCII
    sure = all(c in certain or not is_foreign(c) for c in odd)
    if sure and not _WORD_WITHOUT_ASCII.search(text):
        # What attackers do: every foreign letter is a look-alike inside a Latin word.
        return _replaced(text, odd, mixed)
    latin_message: bool | None = None

    def latin(match: re.Match[str]) -> str:
        nonlocal changed, latin_message
        word = match.group()
        plain = word.translate(mixed)
        if plain == word:
            return word
        if len({script(c) for c in word if ord(c) in mixed}) > 1 and not any(
            is_foreign(c) and ord(c) not in mixed for c in word
        ):
            # Greek beside Cyrillic is no language's word.
            pass
        elif _ASCII_LETTERS.isdisjoint(word):
            # A word of look-alikes alone, in a message that is Latin otherwise and holds no letter that could
            # only be foreign: "рау" beside "now".
            if latin_message is None:
                latin_message = sure and _mostly_latin(text)
            if not latin_message or len(word) < 3 or not plain.isascii():
                return word
        elif not sure:
            ascii_letters = sum(map(_ASCII_LETTERS.__contains__, word))
            foreign = sum(map(is_foreign, word))
            if ascii_letters <= foreign and sum(map(certain.__contains__, word)) < foreign:
                return word
        changed += sum(map(ne, word, plain))
        return plain

    return _MIXED_WORD.sub(latin, text), changed


def _replaced(text: str, odd: set[str], table: dict[int, str]) -> tuple[str, int]:
    """`text.translate(table)` where only the characters in `odd` are in question, and how many it replaced.

    A replacement a character is ten times as fast as translating, while there are few of them.
    """
    found = [c for c in odd if ord(c) in table]
    changed = sum(map(text.count, found))
    if len(found) > 40:
        return text.translate(table), changed
    for c in found:
        text = text.replace(c, table[ord(c)])
    return text, changed


def is_foreign(character: str) -> bool:
    return not "\0" <= character <= "\u024f" and character.isalpha()


@cache
def _scripts() -> dict[int, str]:
    names = ((code, unicodedata.name(chr(code)).split()[0]) for code in characters().mixed)
    return {code: name for code, name in names if name in ("GREEK", "CYRILLIC")}


def script(character: str) -> str:
    """GREEK, CYRILLIC, or nothing: which of the two a look-alike is from."""
    return _scripts().get(ord(character), "")


def _mostly_latin(text: str) -> bool:
    letters = sum(map(_ASCII_LETTERS.__contains__, text))
    return 2 * letters > sum(map(str.isalpha, text))


class _Kinds(dict[str, int]):
    """What stages a character needs, found at its first sight and remembered (never more than MOST)."""

    MOST = 20_000

    def __init__(self, mixed: dict[int, str], always: dict[int, str]) -> None:
        super().__init__()
        self._mixed, self._always = mixed, always

    def of(self, text: str) -> int:
        """What the characters of the text need, all together."""
        needs = 0
        for odd in set(text) - _ASCII:
            needs |= self[odd]
        return needs

    def __missing__(self, character: str) -> int:
        # Casefolding comes last: what it makes of the character counts as well.
        needs = 0
        for c in {character, *character.casefold()}:
            needs |= self._needs(c)
        if len(character.casefold()) != 1:
            needs |= Need.NORMAL
        if len(self) >= self.MOST:
            self.clear()
        self[character] = needs
        return needs

    def _needs(self, c: str) -> int:
        needs, category = 0, unicodedata.category(c)
        if _INVISIBLE.match(c):
            needs |= Need.UNSEEN | (Need.BIDI if _OVERRIDES.match(c) or _TAGS.match(c) else 0)
        if re.match(f"[{_JOINERS}]", c):
            needs |= Need.JOINER
        if re.match(f"[{_JOINING_SCRIPTS}]", c):
            needs |= Need.JOINING
        if category[0] == "M":
            needs |= Need.MARK
        # Hangul letters compose with the syllable before them.
        if category[0] == "M" or "\u1100" <= c <= "\u11ff" or not unicodedata.is_normalized("NFKC", c):
            needs |= Need.NORMAL
            if _FANCY.match(c):
                needs |= Need.FANCY
            if _FULLWIDTH.match(c):
                needs |= Need.WIDE
        if ord(c) in _PUNCTUATION:
            needs |= Need.PUNCTUATION
        if ord(c) in self._always:
            needs |= Need.DISGUISED
        if c == "\u3002":
            needs |= Need.DOT
        if "\U0001f1e6" <= c <= "\U0001f1ff":
            needs |= Need.REGIONAL
        if ord(c) in self._mixed:
            needs |= Need.ALIKE
        return needs


@dataclass(frozen=True)
class Characters:
    """Tables from Unicode's confusables and categories, built at the first non-ASCII message (some 60 ms)."""

    before: dict[int, str]
    """What NFKC would spell with brackets: ``⒜``."""
    punctuation: dict[int, str]
    mixed: dict[int, str]
    certain: frozenset[str]
    always: dict[int, str]
    stacks: re.Pattern[str]
    stray: re.Pattern[str]
    kinds: _Kinds


_MIXABLE = frozenset(
    {"CYRILLIC", "GREEK", "COPTIC", "ARMENIAN", "CHEROKEE", "LISU", "CANADIAN", "DESERET", "WARANG",
     "GEORGIAN", "RUNIC", "TIFINAGH", "OSAGE", "LATIN"}
)  # fmt: skip
# Alike enough for a reader in the middle of a Latin word, though Unicode does not list them as confusable.
_ALSO_ALIKE = {
    **dict(zip("вкмнтгпияшўїєё", "bkmhtrnurwyiee", strict=True)),
    **dict(zip("ηωτκεβχυμπ", "nwtkebxuun", strict=True)),
    **dict(zip("ɡɑɩɪʏɛǝƒ", "gaiiyeef", strict=True)),
}


@cache
def characters() -> Characters:
    certain, always = _confusables()
    mixed = {**certain, **{c: p for c, p in _with_capitals(_ALSO_ALIKE).items() if c not in certain}}
    marks = _class(i for i in range(0x300, 0x1E944) if unicodedata.category(chr(i)) in ("Mn", "Me"))
    mixed_codes = {ord(k): v for k, v in mixed.items() if k.isalnum()}
    always_codes = {ord(k): v for k, v in always.items()}
    return Characters(
        before={0x249C + i: chr(97 + i) for i in range(26)},
        punctuation=_PUNCTUATION,
        mixed=mixed_codes,
        certain=frozenset(certain),
        always=always_codes,
        stacks=re.compile(f"([{marks}]{{4}})[{marks}]+"),
        stray=re.compile(f"(?<=[A-Za-z0-9])[{marks}]+"),
        kinds=_Kinds(mixed_codes, always_codes),
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
    # Listed beside i, drawn as l: the letter of the best known look-alike of apple.com.
    mixed["ӏ"] = "l"
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

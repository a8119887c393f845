"""Reading many messages at once, with the outcome of `reading.read` for each.

All messages stand in one array of code points, 0 after each. Folding what has one character for one, dropping
what is unseen, joining blanks, and finding the messages that need no more, are then a few dozen array
operations for the whole batch, a few microseconds a message. Whatever is not simple in that sense (combining
marks, scripts that join, several letters for one, controls) is left to `reading.one_pass`, message by
message, and so are the stages that a message turns out to need. The tables of characters are those of
`folding`; only its rule for words of mixed scripts is written a second time (`_unmix`), for arrays. That both
ways read alike is a property in the tests.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from redqueen.text import reading
from redqueen.text.folding import SIGNS, WORDY_CHARACTERS, Need, characters, is_foreign, script
from redqueen.text.reading import (
    EDGE,
    LEET,
    LINK,
    MAX_PASSES,
    REPEATS,
    SPELT,
    URL,
    Reading,
    finish,
    measured,
    one_pass,
    staged,
)

CHUNK = 4_000
"""Messages that stand in one array."""
LONG = 2_000
"""Characters from which on a message gains nothing from company."""
FEW = 24
"""So few messages are read one by one."""

Codes = NDArray[np.uint32]
Flags = NDArray[np.bool_]


def read_many(texts: Sequence[str]) -> list[Reading]:
    """`read` of each text, in order: the same readings, several times as fast for many short messages."""
    readings: list[Reading] = [_NOTHING] * len(texts)
    for start in range(0, len(texts), CHUNK):
        _read_chunk(texts[start : start + CHUNK], readings, start)
    return readings


_NOTHING = Reading("", 0.0)


def _read_chunk(texts: Sequence[str], readings: list[Reading], offset: int) -> None:
    waiting = list(range(len(texts)))
    current = list(texts)
    changed = [0] * len(texts)
    for spent in range(MAX_PASSES):
        if len(waiting) < FEW:
            for i in waiting:
                readings[offset + i] = finish(texts[i], current[i], changed[i], MAX_PASSES - spent)
            return
        given = [current[i] for i in waiting] if spent else current
        again = []
        for i, before, (following, more, settled) in zip(waiting, given, _pass(given), strict=True):
            if following == before:
                readings[offset + i] = measured(texts[i], following, changed[i])
                continue
            more += changed[i]
            if settled:
                readings[offset + i] = measured(texts[i], following, more)
            else:
                current[i], changed[i] = following, more
                again.append(i)
        waiting = again
    for i in waiting:
        readings[offset + i] = finish(texts[i], current[i], changed[i], 0)


def _pass(texts: list[str]) -> list[tuple[str, int, bool]]:
    """`reading.one_pass` of each text."""
    passed: list[tuple[str, int, bool]] = [("", 0, True)] * len(texts)
    ascii_, other = [], []
    for i, text in enumerate(texts):
        if "\0" in text or len(text) > LONG:
            passed[i] = one_pass(text)
        elif text.isascii():
            ascii_.append(i)
        else:
            other.append(i)
    for places, fold_many in ((ascii_, _fold_ascii), (other, _fold_other)):
        if not places:
            continue
        texts_here = [texts[i] for i in places]
        folded = fold_many(texts_here)
        tidy, busy = _screen(folded.codes)
        as_folded, as_tidy = _split(folded.codes), _split(tidy)
        changed, settled = folded.changed.tolist(), folded.settled.tolist()
        for i, row in zip(places, zip(as_tidy, changed, settled, strict=True), strict=True):
            passed[i] = row
        for j in np.flatnonzero((busy != 0) | folded.odd).tolist():
            if folded.odd[j]:
                passed[places[j]] = one_pass(texts_here[j])
                continue
            stages = int(busy[j])
            if stages & _ASK:
                stages = stages & ~_ASK | reading.cloaks(as_tidy[j])
            passed[places[j]] = staged(as_folded[j], as_tidy[j], stages, changed[j], settled[j])
    return passed


@dataclass(frozen=True)
class _Folded:
    """Messages folded: their code points, 0 after each, and what is known of each message."""

    codes: Codes
    changed: NDArray[np.int64]
    settled: Flags
    odd: Flags
    """Not folded: something in the message is not simple."""


def _joined(texts: Iterable[str]) -> str:
    return "\0".join(texts) + "\0"


def _split(codes: Codes) -> list[str]:
    if codes.size and codes.max() < 128:
        return codes.astype(np.uint8).tobytes().decode("ascii").split("\0")[:-1]
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass").split("\0")[:-1]


def _any(flags: Flags, ends: NDArray[np.intp]) -> Flags:
    """Whether any of a message's characters has the flag."""
    starts = np.concatenate(([0], ends[:-1] + 1))
    return np.logical_or.reduceat(flags, starts)


def _fold_ascii(texts: list[str]) -> _Folded:
    raw = np.frombuffer(_joined(texts).encode("ascii"), dtype=np.uint8)
    ends = np.flatnonzero(raw == 0)
    odd = _CONTROL[raw]
    odd[1:] |= (raw[1:] == ord("I")) & _SMALL[raw[:-1]]
    n = len(texts)
    return _Folded(_LOWER[raw], np.zeros(n, dtype=np.int64), np.ones(n, dtype=bool), _any(odd, ends))


def _ascii(members: str) -> Flags:
    table = np.zeros(128, dtype=bool)
    table[[ord(c) for c in members]] = True
    return table


_CONTROL = _ascii("".join(map(chr, (*range(1, 9), *range(14, 28), 127))))
_SMALL = _ascii("abcdefghijklmnopqrstuvwxyz")
_LOWER = np.array([ord(chr(i).lower()) for i in range(128)], dtype=np.uint32)


# --- folding what is not ASCII ------------------------------------------------------------------------------

(
    _KNOWN, _SIMPLE, _DROP, _COUNTS, _WORDY, _ALIKE, _FOREIGN, _CERTAIN, _WORD, _RESTLESS, _JOINER, _JOINING,
    _GREEK, _CYRILLIC,
) = (1 << i for i in range(14))  # fmt: skip


class _Tables:
    """By code point: what the character is, what it is tamed to, and what that is casefolded to.

    Filled at the first sight of a character; pages that are never touched take no memory.
    """

    def __init__(self) -> None:
        self.is_ = np.zeros(0x110000, dtype=np.uint16)
        self.tamed = np.zeros(0x110000, dtype=np.uint32)
        self.folded = np.zeros(0x110000, dtype=np.uint32)
        self.latin = np.zeros(0x110000, dtype=np.uint32)

    def learn(self, codes: Codes) -> None:
        for code in np.unique(codes[self.is_[codes] & _KNOWN == 0]).tolist():
            self._learn(chr(code))

    def _learn(self, c: str) -> None:
        code, table = ord(c), characters()
        needs = 0 if c.isascii() else table.kinds[c]
        tamed, found = self._tamed(c, needs), _KNOWN
        folded = tamed.casefold()
        simple = (
            len(tamed) == 1
            and len(folded) == 1
            and not needs & (Need.MARK | Need.BIDI | Need.REGIONAL | Need.WIDE)
            and unicodedata.category(tamed)[0] != "M"
            and not "\u1100" <= tamed <= "\u11ff"
            and unicodedata.is_normalized("NFKC", folded)
        )
        if needs & (Need.UNSEEN | Need.JOINER) or (c.isascii() and _CONTROL[code]):
            found |= _DROP | (0 if needs & Need.BIDI else _SIMPLE)
        elif simple:
            found |= _SIMPLE
        counts = bool(needs & Need.FANCY) + (ord(unicodedata.normalize("NFKC", c)[0]) in table.always)
        if counts == 2:
            found &= ~_SIMPLE
        latin = table.mixed.get(ord(tamed)) if len(tamed) == 1 else None
        after = 0 if folded.isascii() else table.kinds.of(folded)
        for flag, holds in (
            (_COUNTS, counts), (_WORDY, c in WORDY_CHARACTERS), (_ALIKE, latin is not None),
            (_FOREIGN, is_foreign(tamed)), (_CERTAIN, tamed in table.certain),
            (_WORD, tamed.isalnum() or tamed == "_"),
            (_RESTLESS, after & ~Need.JOINING), (_JOINER, needs & Need.JOINER),
            (_JOINING, needs & Need.JOINING), (_GREEK, latin and script(tamed) == "GREEK"),
            (_CYRILLIC, latin and script(tamed) == "CYRILLIC"),
        ):  # fmt: skip
            found |= flag if holds else 0
        self.is_[code] = found
        self.tamed[code] = ord(tamed[0])
        self.folded[code] = ord(folded[0])
        self.latin[code] = ord(latin or "\0")

    def _tamed(self, c: str, needs: int) -> str:
        """The character after everything that `folding` does to a character by itself, but case."""
        table = characters()
        normal = unicodedata.normalize("NFKC", table.before.get(ord(c), c))
        return (
            "".join(table.always.get(ord(p), p) for n in normal for p in table.punctuation.get(ord(n), n))
            or c
        )


@cache
def _tables() -> _Tables:
    return _Tables()


def _fold_other(texts: list[str]) -> _Folded:
    tables, n = _tables(), len(texts)
    raw = np.frombuffer(_joined(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint32)
    tables.learn(raw)
    is_ = tables.is_[raw]
    starts = np.concatenate(([0], np.flatnonzero(raw == 0)[:-1] + 1))
    of_message = np.bitwise_or.reduceat(is_, starts)
    odd = np.logical_or.reduceat((is_ & _SIMPLE) == 0, starts)
    odd |= (of_message & (_JOINER | _JOINING)) == _JOINER | _JOINING
    odd |= _any(_after_small(raw), np.flatnonzero(raw == 0))

    # What is unseen goes; inside a word it had been smuggled in.
    seen = np.flatnonzero((is_ & _DROP) == 0)
    gaps = np.diff(seen) > 1
    codes, is_ = raw[seen], is_[seen]
    ends = np.flatnonzero(codes == 0)
    message = np.repeat(np.arange(n), np.diff(np.concatenate(([-1], ends))))
    wordy = (is_ & _WORDY) != 0
    changed = np.bincount(message[1:][gaps & wordy[1:] & wordy[:-1]], minlength=n)
    changed += np.bincount(message[(is_ & _COUNTS) != 0], minlength=n)

    tamed, folded = tables.tamed[codes], tables.folded[codes]
    touched = (of_message & _DROP) != 0
    touched |= _any(tamed != codes, ends)
    restless = (is_ & _RESTLESS) != 0
    if of_message[~odd].any() and (is_ & _ALIKE).any():
        read = _unmix(tamed, is_, message, odd)
        folded = np.where(read, tables.latin[codes], folded)
        restless &= ~read
        more = np.bincount(message[read], minlength=n)
        changed += more
        touched |= more > 0
    dots = np.flatnonzero(tamed == 0x3002)
    if dots.size:
        alone = (
            _ASCII_ALNUM[np.minimum(folded[dots - 1], 128)] & _ASCII_ALNUM[np.minimum(folded[dots + 1], 128)]
        )
        odd[message[dots[alone & (dots > 0)]]] = True
    return _Folded(folded, changed, ~_any(restless, ends) | ~touched, odd)


def _after_small(codes: Codes) -> Flags:
    """A capital I after a small letter (`folding` decides what it stands for)."""
    found = np.zeros(codes.size, dtype=bool)
    places = np.flatnonzero(codes[1:] == ord("I"))
    found[places + 1] = _SMALL[np.minimum(codes[places], 127)]
    return found


def _unmix(tamed: Codes, is_: NDArray[np.uint16], message: NDArray[np.intp], odd: Flags) -> Flags:
    """Which characters are look-alikes to be read as Latin, by the rules of `folding`.

    Marks as odd the messages with a word of look-alikes alone: there the whole message has a say.
    """
    unsure = np.zeros(odd.size, dtype=bool)
    unsure[message[(is_ & (_FOREIGN | _CERTAIN)) == _FOREIGN]] = True
    inside = (is_ & _WORD) != 0
    starts = inside.copy()
    starts[1:] &= ~inside[:-1]
    word = np.cumsum(starts) - 1
    home = message[starts]

    def count(flags: Flags) -> NDArray[np.int64]:
        return np.bincount(word[flags & inside], minlength=home.size)

    alike = (is_ & _ALIKE) != 0
    letters, likes = count(_ASCII_LETTER[np.minimum(tamed, 128)]), count(alike)
    foreign, certain = count((is_ & _FOREIGN) != 0), count((is_ & _CERTAIN) != 0)
    lone = (likes > 0) & (letters == 0) & (count(inside) >= 3) & ~unsure[home]
    greek, cyrillic = count((is_ & _GREEK) != 0), count((is_ & _CYRILLIC) != 0)
    scripts = (greek > 0) * 1 + (cyrillic > 0) + (likes > greek + cyrillic)
    strangers = count((is_ & (_FOREIGN | _ALIKE)) == _FOREIGN)
    odd[home[lone]] = True
    doubtful = unsure[home] & (letters <= foreign) & (certain < foreign)
    latin = (likes > 0) & (letters > 0) & ~doubtful | (scripts > 1) & (strangers == 0)
    return alike & inside & latin[word]


_ASCII_LETTER, _ASCII_ALNUM = (
    np.append([kind(chr(i)) for i in range(128)], False) for kind in (str.isalpha, str.isalnum)
)


# --- screening ----------------------------------------------------------------------------------------------

_LETTER, _LEET, _MARK, _CLOAK, _PARTING, _DIGIT, _FULL_STOP, _BLANK = (1 << i for i in range(8))


def _classes() -> NDArray[np.uint8]:
    """The characters that `reading` looks for; everything outside ASCII may be a letter."""
    table = np.zeros(129, dtype=np.uint8)
    for flag, members in (
        (_LETTER, "abcdefghijklmnopqrstuvwxyz\x80"), (_LEET, "013457@$!|"), (_MARK, "*~^`"),
        (_CLOAK, "[({<%\\:"), (_PARTING, " \n\r.-_*~/\\,+|'\"^=;:?!#&<>()[]{}"), (_DIGIT, "0123456789"),
        (_FULL_STOP, "."), (_BLANK, "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f "),
    ):  # fmt: skip
        for member in members:
            table[ord(member)] |= flag
    return table


_CLASSES = _classes()
_BLANKS = np.array([i for i in range(0x80, 0x3001) if chr(i).isspace()], dtype=np.uint32)
_DOT_CODES = np.array([0xB7, 0x2022], dtype=np.uint32)
_TLD_STARTS = np.array(sorted(map(ord, "cngorx")), dtype=np.uint32)
_SIGN_CODES = np.array(sorted(map(ord, SIGNS)), dtype=np.uint32)


def _screen(codes: Codes) -> tuple[Codes, NDArray[np.uint8]]:
    """The messages with single blanks, and the stages that each may need (never too few of them)."""
    plain = codes.max(initial=0) < 128
    is_ = _CLASSES[codes if plain else np.minimum(codes, 128)]
    blank = (is_ & _BLANK) != 0
    if not plain:
        blank |= np.isin(codes, _BLANKS)
    edge = blank | (codes == 0)
    keep = ~blank
    keep[1:] |= ~edge[:-1]
    keep[:-1] &= ~(blank[:-1] & (codes[1:] == 0)) if codes.size else True
    codes = np.where(blank, np.uint32(32), codes)[keep]
    is_ = np.where(blank, _BLANK | _PARTING, is_).astype(np.uint8)[keep]
    # A run of blanks at the end of a message leaves its first: it has become the last but one character.
    last = np.flatnonzero((codes[1:] == 0) & (codes[:-1] == 32))
    if last.size:
        codes, is_ = np.delete(codes, last), np.delete(is_, last)
    stages = _stages(codes, is_, plain)
    return codes, np.bitwise_or.reduceat(stages, np.concatenate(([0], np.flatnonzero(codes == 0)[:-1] + 1)))


_ASK = 128
"""Not a stage: `reading.cloaks` knows which stages the message may need."""


def _stages(codes: Codes, is_: NDArray[np.uint8], plain: bool) -> NDArray[np.uint8]:
    """At its first character, what each pattern that `reading` looks for asks for."""
    stages = np.where(is_ & _CLOAK, np.uint8(_ASK), np.uint8(0))

    def ask(stage: int, *together: Flags) -> None:
        found = together[0]
        for more in together[1:]:
            found = found & more
        stages[: found.size][found] |= stage

    letter, parting, leet = (is_ & _LETTER) != 0, (is_ & _PARTING) != 0, (is_ & _LEET) != 0
    before_leet = letter[:-1] & leet[1:]
    if before_leet.any():
        ask(LEET, before_leet[:-1], letter[2:])
        ask(LEET, before_leet[:-2], leet[2:-1], letter[3:])
        ask(LEET, before_leet[:-3], leet[2:-2], leet[3:-1], letter[4:])
        ask(EDGE, before_leet[:-1], leet[2:])
        ask(LINK, codes[:-2] == ord("d"), codes[1:-1] == ord("0"), codes[2:] == ord("t"))
    ask(EDGE, codes[:-3] == ord("0"), letter[1:-2], letter[2:-1], letter[3:])
    mark = (is_ & _MARK) != 0
    if mark.any():
        ask(LEET, letter[:-1], mark[1:])
    ask(URL, (is_[:-1] & _FULL_STOP) != 0, letter[1:])
    loose = np.flatnonzero((codes[:-2] == 32) & ((is_[1:-1] & _FULL_STOP) != 0))
    if loose.size:
        after = np.where(
            codes[loose + 2] == 32, codes[np.minimum(loose + 3, codes.size - 1)], codes[loose + 2]
        )
        stages[loose[np.isin(after, _TLD_STARTS)]] |= LINK
    ask(LINK, codes[:-3] == ord("x"), codes[1:-2] == ord("n"), codes[2:-1] == ord("-"), codes[3:] == ord("-"))
    ask(LINK, codes[:-2] == ord("d"), codes[1:-1] == ord("o"), codes[2:] == ord("t"))
    same = codes[1:] == codes[:-1]
    ask(REPEATS, same[1:], same[:-1], (is_[2:] & (_DIGIT | _BLANK)) == 0, codes[2:] != 0)
    parted = letter[:-1] & parting[1:]
    two = parted[:-2] & parted[2:]
    if two.any():
        ask(SPELT, two[:-1], mark[1:-3] | (codes[1:-3] == ord("_")), letter[4:])
        four = np.flatnonzero(two[:-3] & parted[4:-1] & letter[6:])
        # It does not start with the end of a longer word.
        alone = (four == 0) | ~_ASCII_ALNUM[np.minimum(codes[np.maximum(four - 1, 0)], 128)]
        stages[four[alone]] |= SPELT
    wide = parting[:-2] & parting[1:-1] & letter[2:]
    ask(SPELT, wide[:-3], wide[3:])
    if not plain:
        sign = np.isin(codes, _SIGN_CODES)
        ask(LEET | EDGE, sign[:-1], letter[1:])
        ask(SPELT | LEET, np.isin(codes, _DOT_CODES))
    return stages

"""The ways an abuser rewrites a message so that a person still reads it and a detector does not.

Belongs here: one dataclass a family, its threat and cost in a sentence, its MITRE ATLAS technique, and the
rewriting itself. Does not belong here: anything that has seen a score; how the rewriting is *aimed* is
`redqueen.attacks.search`.

A family is of one of two kinds. A **word** family rewrites single words (`options` of one word) and is held
to a share of the words. A **message** family offers whole rewritten messages (`extensions` of one message)
and is held to a visible length. Every random choice comes from the generator that is passed in.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "FAMILIES", "BenignPadding", "Family", "Homoglyph", "Invisible", "Leet", "MessageFamily", "Spacing",
    "Typo", "UrlCloaking", "WordFamily", "visible_length",
]  # fmt: skip

_SPLIT = re.compile(r"(\s+)")
_UNSEEN = "\u200b\u200c\u200d\u2060\u00ad\ufeff"
_UNSEEN_TABLE = dict.fromkeys(map(ord, _UNSEEN))
_LINK = re.compile(r"(https?://)?((?:[\w-]+\.)+[a-z]{2,24})((?:/[^\s<>]*)?)", re.IGNORECASE)


def visible_length(text: str) -> int:
    """Characters that a reader sees, blanks included."""
    return len(text.translate(_UNSEEN_TABLE))


@dataclass(frozen=True)
class Family:
    """What every family declares. `name` keys reports; `atlas` is the MITRE ATLAS technique."""

    name: ClassVar[str]
    atlas: ClassVar[str]
    """AML.T0043 (craft adversarial data) where characters are crafted, AML.T0015 (evade ML model) where the
    message is only dressed differently."""
    threat: ClassVar[str]
    max_growth: ClassVar[float]
    """Visible length of a rewritten message over the original's; `slack` characters come on top."""
    slack: ClassVar[int] = 8

    def mutate(self, text: str, strength: float, rng: random.Random) -> str:
        """The message rewritten blindly. `strength` in [0, 1] is the share of words (or of the allowed
        growth)."""
        raise NotImplementedError

    def readable(self, original: str, mutated: str) -> bool:
        """Whether a person would still read the original in it without effort: the bound on visible
        length."""
        return bool(mutated) and visible_length(mutated) <= self.length_limit(original)

    def length_limit(self, original: str) -> int:
        """The most visible characters a rewriting of this message may have."""
        return int(self.max_growth * visible_length(original)) + self.slack


@dataclass(frozen=True)
class WordFamily(Family):
    """A family that rewrites single words; at most `max_words_share` of them (and always at least one may
    be)."""

    max_words_share: float = 0.25
    min_letters: int = 3

    def options(self, word: str, rng: random.Random, count: int) -> list[str]:
        """At most `count` different rewritings of one word, none of them the word itself; empty where none
        apply."""
        found: dict[str, None] = {}
        for _ in range(3 * count):
            changed = self.rewrite(word, rng)
            if changed != word:
                found[changed] = None
                if len(found) == count:
                    break
        return list(found)

    def rewrite(self, word: str, rng: random.Random) -> str:
        """One rewriting of one word; the word itself where the family has nothing to offer."""
        raise NotImplementedError

    def applies(self, word: str) -> bool:
        """Whether the word has enough letters and is no link: rewriting a link would break it for the
        victim."""
        return sum(map(str.isalpha, word)) >= self.min_letters and not _LINK.search(word)

    def max_words(self, words: int) -> int:
        """How many of so many words may be rewritten."""
        return max(1, int(self.max_words_share * words))

    def mutate(self, text: str, strength: float, rng: random.Random) -> str:
        pieces = _SPLIT.split(text)
        places = [i for i in range(0, len(pieces), 2) if self.applies(pieces[i])]
        total = sum(bool(pieces[i]) for i in range(0, len(pieces), 2))
        allowed = min(self.max_words(total), round(strength * total))
        rng.shuffle(places)
        for place in places[:allowed]:
            before, pieces[place] = pieces[place], self.rewrite(pieces[place], rng)
            if not self.readable(text, "".join(pieces)):
                pieces[place] = before
        return "".join(pieces)


def _some(places: Sequence[int], rng: random.Random, most: int) -> list[int]:
    """Some of the places, at least one, at most so many, in order."""
    return sorted(rng.sample(places, rng.randint(1, min(most, len(places)))))


def _swapped(word: str, choices: Mapping[str, str], rng: random.Random) -> str:
    """Some of the letters that have choices, up to half of the word, each as one of them."""
    places = [i for i, letter in enumerate(word) if letter in choices]
    letters = list(word)
    for place in _some(places, rng, max(1, len(word) // 2)) if places else []:
        letters[place] = rng.choice(choices[letters[place]])
    return "".join(letters)


@dataclass(frozen=True)
class Invisible(WordFamily):
    name = "invisible"
    atlas = "AML.T0043"
    threat = "Zero-width characters inside words: one paste from a web page, nothing to see for the reader."
    max_growth = 1.0

    def rewrite(self, word: str, rng: random.Random) -> str:
        inside = range(1, len(word))
        for place in reversed(_some(inside, rng, 4) if inside else []):
            word = word[:place] + rng.choice(_UNSEEN) + word[place:]
        return word


_ALIKE = {
    "a": "аα\uff41𝐚", "b": "Ьᖯ", "c": "сϲ𝖼", "d": "ԁⅾ", "e": "еé𝐞℮", "g": "ɡ", "h": "һհ", "i": "іı𝗂",
    "j": "ј",     "k": "κк", "l": "ӏ𝗅", "m": "м𝗆", "n": "ոñ𝗇", "o": "оοö𝗈", "p": "рρ", "q": "ԛ", "r": "г𝗋",
    "s": "ѕ𝗌", "t": "т𝗍",
    "u": "υü𝗎", "v": "ѵν", "w": "ԝω", "x": "хχ", "y": "уγ", "z": "ᴢ𝗓", "A": "АΑ", "B": "ВΒ",
    "C": "С", "E": "ЕΕ",
    "H": "НΗ", "I": "ІΙ", "J": "Ј", "K": "КΚ", "M": "МΜ", "N": "Ν", "O": "ОΟ", "P": "РΡ", "S": "Ѕ",
    "T": "ТΤ", "X": "ХΧ",
    "Y": "УΥ", "Z": "Ζ",
}  # fmt: skip


@dataclass(frozen=True)
class Homoglyph(WordFamily):
    name = "homoglyph"
    atlas = "AML.T0043"
    threat = "Letters of other scripts that look the same: a converter site, hardly visible to the reader."
    max_growth = 1.0

    def rewrite(self, word: str, rng: random.Random) -> str:
        return _swapped(word, _ALIKE, rng)


_LEET = {
    "a": "4@", "b": "8", "e": "3€", "g": "9", "i": "1!|", "l": "1|", "o": "0", "s": "5$", "t": "7+", "z": "2",
}  # fmt: skip
_LEET |= {letter.upper(): signs for letter, signs in _LEET.items()}


@dataclass(frozen=True)
class Leet(WordFamily):
    name = "leet"
    atlas = "AML.T0043"
    threat = "Digits and signs for letters: free, typed by hand, readers are used to it."
    max_growth = 1.0

    def rewrite(self, word: str, rng: random.Random) -> str:
        return _swapped(word, _LEET, rng)


@dataclass(frozen=True)
class Spacing(WordFamily):
    name = "spacing"
    atlas = "AML.T0043"
    threat = "Words broken by blanks, dots or dashes: free, a little slower to read."
    max_growth = 1.5

    def rewrite(self, word: str, rng: random.Random) -> str:
        inside = range(1, len(word))
        separator = rng.choice(" .-_*")
        places: Sequence[int] = inside if rng.random() < 0.4 else _some(inside, rng, 2) if inside else ()
        for place in reversed(places):
            word = word[:place] + separator + word[place:]
        return word


_BESIDE = {
    "a": "sqz", "b": "vgn", "c": "xvd", "d": "sfe", "e": "wr", "f": "dgr", "g": "fht", "h": "gjy", "i": "uo",
    "j": "hku", "k": "jl", "l": "k", "m": "n", "n": "bm", "o": "ip", "p": "o", "q": "wa", "r": "et",
    "s": "adw",    "t": "ry", "u": "yi", "v": "cb", "w": "qe", "x": "zc", "y": "tu", "z": "xa",
}  # fmt: skip


@dataclass(frozen=True)
class Typo(WordFamily):
    name = "typo"
    atlas = "AML.T0043"
    threat = (
        "Slips of the keyboard inside a word (its first letter stays): free, honest people make them too."
    )
    max_growth = 1.1
    min_letters: int = 4

    def rewrite(self, word: str, rng: random.Random) -> str:
        for _ in range(1 if len(word) < 8 else rng.randint(1, 2)):
            word = self._slip(word, rng)
        return word

    def _slip(self, word: str, rng: random.Random) -> str:
        places = [i for i in range(1, len(word)) if word[i].isalpha()]
        if not places:
            return word
        place = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0 and place + 1 < len(word):
            return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        if kind == 1:
            return word[:place] + word[place + 1 :]
        if kind == 2:
            return word[:place] + word[place] + word[place:]
        return word[:place] + rng.choice(_BESIDE.get(word[place].lower(), word[place])) + word[place + 1 :]


@dataclass(frozen=True)
class MessageFamily(Family):
    """A family that rewrites a message as a whole, a step at a time."""

    steps: ClassVar[int] = 1
    """How often an extension may be extended again."""

    def extensions(self, text: str, rng: random.Random, count: int) -> list[str]:
        """At most `count` rewritings, one step further than `text`; empty where the family has nothing to
        offer."""
        raise NotImplementedError

    def mutate(self, text: str, strength: float, rng: random.Random) -> str:
        current = text
        for _ in range(round(strength * self.steps)):
            further = [t for t in self.extensions(current, rng, 1) if self.readable(text, t)]
            current = further[0] if further else current
        return current


_BENIGN = (
    "see you tomorrow at the usual place", "thanks, that was really helpful", "how was your weekend?",
    "the meeting is moved to three", "lol yes exactly", "good game everyone", "happy birthday!",
    "can you send me the notes from class", "I finally finished the book you told me about",
    "what are we having for dinner", "the train is late again", "my cat sleeps on the keyboard",
    "does anyone remember the name of that song", "the patch notes are out", "call me when you are home",
    "ok sounds good to me", "I will bring the cake", "that match was so close", "sorry, was asleep",
    "it is raining here all day", "we should go hiking in the summer", "hope your exam went well",
)  # fmt: skip


@dataclass(frozen=True)
class BenignPadding(MessageFamily):
    name = "padding"
    atlas = "AML.T0015"
    threat = "Harmless sentences before and after the abuse: free, the reader skips them."
    max_growth = 2.0
    slack = 60
    steps = 3

    phrases: tuple[str, ...] = _BENIGN
    """What is padded with; pass real benign messages of the platform for a stronger attack."""

    def extensions(self, text: str, rng: random.Random, count: int) -> list[str]:
        chosen = rng.sample(self.phrases, min(count, len(self.phrases)))
        return [f"{phrase}\n{text}" if rng.random() < 0.7 else f"{text}\n{phrase}" for phrase in chosen]


@dataclass(frozen=True)
class UrlCloaking(MessageFamily):
    name = "url"
    atlas = "AML.T0015"
    threat = (
        "Links written so that a person still gets there: redirects, escapes, [.], 'dot'; costs some clicks."
    )
    max_growth = 1.0
    slack = 80
    steps = 1

    def extensions(self, text: str, rng: random.Random, count: int) -> list[str]:
        if not _LINK.search(text):
            return []
        cloaks = list(_CLOAKS)
        rng.shuffle(cloaks)
        made = dict.fromkeys(_LINK.sub(cloak, text) for cloak in cloaks[:count])
        return [mutated for mutated in made if mutated != text]


def _whole(m: re.Match[str]) -> str:
    return (m[1] or "https://") + m[2] + m[3]


_CLOAKS = (
    lambda m: (m[1] or "").replace("http", "hxxp") + m[2].replace(".", "[.]") + m[3],
    lambda m: m[2].replace(".", " dot ") + m[3],
    lambda m: m[2].replace(".", " . ") + m[3],
    lambda m: m[2].replace(".", "(.)") + m[3],
    lambda m: f"https://www.google.com/url?q={_whole(m)}",
    lambda m: f"[here]({_whole(m)})",
    lambda m: f"<{_whole(m)}>",
    lambda m: (m[1] or "https://") + f"%{ord(m[2][0]):02x}" + m[2][1:] + m[3],
    lambda m: "https://support@" + m[2] + m[3],
    lambda m: m[2].replace(".", ".\u200b") + m[3],
)

FAMILIES: tuple[Family, ...] = (
    Invisible(),
    Homoglyph(),
    Leet(),
    Spacing(),
    Typo(),
    BenignPadding(),
    UrlCloaking(),
)
"""Every family, in the order in which they are tried."""

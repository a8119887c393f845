"""Reading a message the way a person would: canonical form, what it took to get there, fingerprint, domains.

Belongs here: pure functions of one string (or of many, each for itself). Does not belong here: anything that
knows an actor, a time or a model (see `redqueen.features`), what messages have in common (see
`redqueen.campaigns`), and ways of *making* obfuscated text (see `redqueen.attacks`).

The canonical form is a second view beside the raw text, never a replacement: a look-alike domain such as
``discоrd.gift`` becomes readable in it, and the fact that it had to be changed is `obfuscation`.

Rules of the canonical form, in the order in which they run until nothing changes any more:

1. invisible, bidi, tag and control characters go (joiners that a script needs stay; words written backwards
   behind a bidi override are turned round); NFKC; typographic quotes and dashes become plain; free combining
   marks go (accents that compose, é, ü, й, stay);
2. look-alikes become Latin letters, but only in a word that mixes scripts, or where every foreign word of a
   Latin message consists of look-alikes alone; whole Cyrillic, Greek, Armenian... words stay what they are;
   casefold (a capital I that stands for an l, ``paypaI``, is an l);
3. links are refanged (``hxxp``, ``[.]``, ``(dot)``) and unwrapped (markdown, redirects, percent-encoded
   letters, punycode, addresses written as one number), and are then left alone by what follows;
4. letters with separators between each are joined (``f r e e``, ``f.r-e.e``: four letters or more, so that
   ``u.s.a.`` stays); leet inside words with letters is read; three of a kind or more become two (but not
   in a word as short as ``aaa``); white space becomes one blank.

`folding` holds 1 and 2, `links` 3, `words` 4, `reading` runs them, `batch` runs them for many
messages at once; `fingerprints` is apart.
"""

from redqueen.text.batch import read_many
from redqueen.text.fingerprints import hamming, simhash
from redqueen.text.links import hosts
from redqueen.text.reading import Reading, canonicalise, domains, obfuscation, read

__all__ = [
    "Reading", "canonicalise", "domains", "hamming", "hosts", "obfuscation", "read", "read_many", "simhash",
]  # fmt: skip

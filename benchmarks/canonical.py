"""Canonical text: how fast it is read, what a detector regains under attack, and what clean text loses by it.

- `messages_per_s`, `attacked_per_s`: short messages (UCI SMS, some 80 characters) on one core through the
  batch API, `read_many`; the single one, `read`, is printed beside it. Attacked: every message by every
  family of `redqueen.attacks.families` at full strength (a quarter of the words), where that changes
  anything.
- `linear_ratio`: time a character at 10 kB over that at 100 B, one message at a time: the first 100
  characters of a real message (clean or attacked) against the same repeated to 10 kB, so that both need
  the same stages.
- `recall`: share of attacked abusive messages that a character n-gram model catches at 1% false positives on
  clean messages, reading raw text against reading the canonical form (trained on what it reads). Attacked
  blindly and without the bound on words: every word that a family can rewrite.
- `altered_share`: share of clean texts in which letters or digits read differently than after case folding
  and NFKC; the sentences of `tests/languages.py` and the clean side of the data sets.
  `altered_beyond_case_share` counts any difference beyond case and blanks: quotes, dashes, emoji joiners,
  "..." to ".." too.

Peers in the same run: NFKC with case folding (the limit of anything that normalises), ftfy and a plain
look-up of confusables where they are installed.
"""

from __future__ import annotations

import random
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from common import QUICK, best_of, finish, shared_data, show

from redqueen.attacks.families import FAMILIES, WordFamily
from redqueen.text import canonicalise, read, read_many

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.languages import SENTENCES

SEED = 7
STRENGTH = 1.0
FPR = 0.01
WITHOUT_BOUND = tuple(
    replace(family, max_words_share=1.0) if isinstance(family, WordFamily) else family for family in FAMILIES
)
REPEATS = 3 if QUICK else 9
SPLITS = 1 if QUICK else 5
ADVERSARIAL = (
    "a.", "f r e e ", "%25", "e\u0316\u0301", "w1n", "http://", "[a](http://b) ", "е", "@a|", "\u200b",
    "\u202ea", "xn--a", "aaab", "aI", "рау ", "ﷺ", "a-", "\\", "🇪 ", "İ",
)  # fmt: skip


def main() -> None:
    """Measure, print tables, end with the figures."""
    sms = pl.read_parquet(f"{shared_data()}/uci_sms/uci_sms.parquet")
    texts, abusive = (
        sms["text"].to_list(),
        (sms["label"].cast(pl.String).is_in(["spam", "1", "true"])).to_list(),
    )
    figures: dict[str, object] = {}
    figures |= speed(texts)
    figures |= linearity(texts)
    figures |= recall(texts, np.array(abusive))
    figures |= altered(texts, abusive)
    finish(figures)


# --- speed --------------------------------------------------------------------------------------------------


def attacked(texts: Sequence[str]) -> dict[str, list[str]]:
    """By family: the messages as it rewrites them, where it changes anything."""
    rng = random.Random(SEED)
    made = {}
    for family in FAMILIES:
        pairs = ((text, family.mutate(text, STRENGTH, rng)) for text in texts)
        made[family.name] = [after for before, after in pairs if after != before]
    return made


def rate(work: Callable[[Sequence[str]], object], texts: Sequence[str]) -> float:
    """Texts a second of CPU."""
    return len(texts) / best_of(lambda: work(texts), REPEATS)


def one_by_one(function: Callable[[str], object]) -> Callable[[Sequence[str]], object]:
    return lambda texts: [function(text) for text in texts]


def speed(texts: Sequence[str]) -> dict[str, object]:
    """Messages a second, clean and attacked, batch and single, beside the peers."""
    families = attacked(texts)
    mixed = [text for made in families.values() for text in made]
    mixed = random.Random(SEED).sample(mixed, len(texts))
    sets = {"clean": texts, "attacked": mixed, **families}
    limit = one_by_one(lambda text: unicodedata.normalize("NFKC", text).casefold())
    read_many(mixed)  # tables are built at the first sight of a character
    rows, rates = [], {}
    for name, some in sets.items():
        rates[name] = rate(read_many, some)
        rows.append(
            (name, len(some), f"{np.mean([len(t) for t in some]):.0f}", round(rates[name]),
             round(rate(one_by_one(read), some)), round(rate(limit, some)))
        )  # fmt: skip
    show(
        "messages/s on one core", ("messages", "n", "characters", "read_many", "read", "NFKC+casefold"), rows
    )
    peers = [
        (name, round(rate(one_by_one(peer), texts)), round(rate(one_by_one(peer), mixed)))
        for name, peer in others()
    ]
    ours = ("read_many", round(rates["clean"]), round(rates["attacked"]))
    show("peers, messages/s", ("reader", "clean", "attacked"), [ours, *peers])
    return {"messages_per_s": rates["clean"], "attacked_per_s": rates["attacked"]}


def others() -> list[tuple[str, Callable[[str], object]]]:
    """What others offer for parts of the work."""
    found: list[tuple[str, Callable[[str], object]]] = []
    try:
        import ftfy

        found.append(("ftfy.fix_text", ftfy.fix_text))
    except ImportError:
        print("ftfy is not installed: left out")
    from confusable_homoglyphs import confusables

    found.append(("confusable_homoglyphs.is_dangerous", confusables.is_dangerous))
    return found


def linearity(texts: Sequence[str]) -> dict[str, object]:
    """Time a character at 10 kB over that at 100 B; and what anybody could repeat to make us slow."""
    rng = random.Random(SEED)
    long = rng.sample([text for text in texts if len(text) >= 99], 40)
    hidden = [rng.choice(FAMILIES).mutate(text, STRENGTH, rng) for text in long]

    def per_character(units: Sequence[str], size: int) -> float:
        made = [
            (unit[:99] + " ") * (size // 100) if len(unit) > 98 else (unit * size)[:size] for unit in units
        ]
        again = max(1, (10_000 if QUICK else 20_000) // size)
        return best_of(lambda: [read(text) for _ in range(again) for text in made], 3) / (
            again * sum(map(len, made))
        )

    sizes = (100, 1_000, 10_000) if QUICK else (100, 1_000, 10_000, 100_000)
    rows, ratios = [], []
    for name, some in (("clean messages repeated", long), ("attacked messages repeated", hidden)):
        times = [per_character(some[: 10 if size > 50_000 else None], size) for size in sizes]
        ratios.append(times[2] / times[0])
        rows.append((name, *(f"{1e9 * t:.0f}" for t in times)))
    for unit in ADVERSARIAL:
        rows.append((f"{unit!r} repeated", *(f"{1e9 * per_character([unit], size):.0f}" for size in sizes)))
    show("ns a character", ("text", *(f"{size:,} characters" for size in sizes)), rows)
    return {"linear_ratio": max(ratios)}


# --- what a detector regains --------------------------------------------------------------------------------


def recall(texts: Sequence[str], abusive: np.ndarray) -> dict[str, object]:
    """Recall at 1% FPR on attacked abuse, by family, raw against canonical; means over splits."""
    seen: dict[str, int] = {}
    for i, text in enumerate(texts):
        seen.setdefault(canonicalise(text), i)
    rows = np.array(sorted(seen.values()))  # copies of a message must not straddle a split
    outcome: dict[str, dict[str, list[float]]] = {}
    for split in range(SPLITS):
        order = np.random.default_rng(SEED + split).permutation(rows)
        train, valid, test = np.split(order, [len(order) // 2, 3 * len(order) // 4])
        targets = [texts[i] for i in test if abusive[i]]
        rng = random.Random(SEED + split)
        sets = {"none": targets}
        for family in WITHOUT_BOUND:
            sets[family.name] = [family.mutate(text, STRENGTH, rng) for text in targets]
        for view, look in (("raw", list), ("canonical", lambda some: [r.canonical for r in read_many(some)])):
            model = ngram_model(look([texts[i] for i in train]), abusive[train])
            benign = np.sort(model(look([texts[i] for i in valid if not abusive[i]])))
            cut = benign[int(np.ceil((1 - FPR) * len(benign))) - 1]
            for name, some in sets.items():
                caught = float((model(look(some)) > cut).mean())
                outcome.setdefault(name, {}).setdefault(view, []).append(caught)
    means = {name: {view: float(np.mean(v)) for view, v in views.items()} for name, views in outcome.items()}
    title = f"recall at {FPR:.0%} FPR, character n-grams, UCI SMS, mean of {SPLITS} splits"
    rows_shown = [(name, views["raw"], views["canonical"]) for name, views in means.items()]
    show(title, ("attack", "raw", "canonical"), rows_shown)
    return {"recall": means}


def ngram_model(texts: Sequence[str], labels: np.ndarray) -> Callable[[Sequence[str]], Any]:
    """Logistic regression on character 2- to 4-grams; returns a scorer."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    grams = TfidfVectorizer(
        analyzer="char", ngram_range=(2, 4), min_df=3, sublinear_tf=True, max_features=50_000
    )
    model = LogisticRegression(C=10.0, max_iter=300).fit(grams.fit_transform(texts), labels)
    return lambda some: model.decision_function(grams.transform(some))


# --- what clean text loses ----------------------------------------------------------------------------------


def letters(text: str) -> list[str]:
    """Letters and digits after NFKC and case folding: what canonicalising should leave."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return [c for c in folded if c.isalnum()]


def altered(texts: Sequence[str], abusive: Sequence[bool]) -> dict[str, object]:
    """Share of clean texts whose letters or digits change, by source."""
    most = 1500 if QUICK else 6000
    data = shared_data()
    sources: dict[str, list[str]] = {
        f"sentences, {len(SENTENCES)} languages": [s for group in SENTENCES.values() for s in group]
    }
    sources["UCI SMS, ham"] = [t for t, bad in zip(texts, abusive, strict=True) if not bad]
    for name, path in (
        ("Enron, ham", "enron_spam/enron_spam"),
        ("SpamAssassin, ham", "spamassassin/spamassassin"),
    ):
        frame = pl.read_parquet(f"{data}/{path}.parquet")
        text = next(c for c in ("text", "body", "message") if c in frame.columns)
        clean = frame.filter(~frame["label"].cast(pl.String).is_in(["spam", "1", "true"]))[text].drop_nulls()
        sources[name] = [t[:1000] for t in clean.sample(min(most, clean.len()), seed=SEED).to_list()]
    rows, changed, total, strict_total = [], 0, 0, 0
    for name, some in sources.items():
        got = [r.canonical for r in read_many(some)]
        different = [letters(a) != [c for c in b if c.isalnum()] for a, b in zip(some, got, strict=True)]
        strict = sum(" ".join(a.casefold().split()) != b for a, b in zip(some, got, strict=True))
        rows.append((name, len(some), sum(different) / len(some), strict / len(some)))
        changed, total, strict_total = changed + sum(different), total + len(some), strict_total + strict
    rows.append(("all", total, changed / total, strict_total / total))
    show("clean text altered", ("texts", "n", "letters or digits", "anything beyond case and blanks"), rows)
    return {
        "altered_share": changed / total,
        "altered_share_sentences": float(rows[0][2]),
        "altered_beyond_case_share": strict_total / total,
    }


if __name__ == "__main__":
    main()

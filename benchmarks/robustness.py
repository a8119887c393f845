"""What a detector loses when abuse is rewritten blindly, by family, against n-grams and MiniLM.

Real messages in two sets: `sms` (UCI SMS) and `mail` (SpamAssassin, subject and body, the first 1,000
characters). Both are cut into five folds by near-duplicate group; each fold is the test of models that
learnt from the others. Abusive messages of a test are rewritten by each family at a fixed strength
(`families`: shares of words, letters or length), without asking any model. What is compared is recall at 1%
false positives, the threshold being what the clean benign messages of the test give. A family is judged on
the messages that it can rewrite: the drop is recall on those as they were less recall on them rewritten,
message by message.

- `worst_drop`: the largest drop of the detector over the families, which are all of kinds that its training
  knows (made by other code, see `models.perturb`). `worst_drop_high`: the upper end of its 95% interval.
- `heldout_drop`: the same over families each of which was left out of the training that it is judged on;
  `heldout_drop_high` ends its interval.
- `recall`, `drop`: the detector's, by set and family; `clean` is all abuse of the tests as it was. `heldout`:
  the drop by set and family where the family was left out.
- `peers`: recall and worst drop of a logistic regression on character n-grams, of raw text (`ngram_raw`) and
  of canonical text (`ngram`), and of MiniLM's sentence vectors under a logistic regression (`minilm`).
- `fpr_rewritten`: share of benign messages, rewritten alike, over the same threshold, by family: a detector
  that took the rewriting itself for abuse would show here.

The detector is what the training process makes (`models.train`) and scores by text alone (`score_texts`);
with the features that follow from the text as well, it is `full`. MiniLM comes from the package index into
`.bench/minilm`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import streams
from common import QUICK, finish, minilm_folder, shared_data, show
from numpy.typing import NDArray

from redqueen.attacks import Homoglyph, Invisible, Leet, Spacing, Typo, UrlCloaking, WordFamily
from redqueen.text import read_many, simhash

SEED = 7
FPR = 0.01
FOLDS = 5
TESTED = 1 if QUICK else FOLDS
HELD_TESTED = 1
"""Folds in which each family is left out of training: one training a family and set."""
SHARE = 0.1 if QUICK else 1.0
MOST_CHARACTERS = 1_000
BENIGN_REWRITTEN = 60 if QUICK else 300

Rewrite = Callable[[str, random.Random], str]
Flags = NDArray[np.bool_]
Job = tuple[Any, ...]
"""The name of a function here, and its arguments."""


# --- families -----------------------------------------------------------------------------------------------

HALF_OF_WORDS = 0.5
HALF_OF_LETTERS = 0.5
FIFTH_OF_WORDS = 0.2
AS_LONG_AGAIN = 1.0


def half_of_the_words(family: WordFamily) -> Rewrite:
    """The family without its bound on words."""
    return partial(_mutated, replace(family, max_words_share=1.0))


def _mutated(family: Any, text: str, rng: random.Random) -> str:
    return str(family.mutate(text, HALF_OF_WORDS if isinstance(family, WordFamily) else 1.0, rng))


def dropped_and_doubled(text: str, rng: random.Random) -> str:
    """A tenth of the words gone and a tenth twice, on average."""
    kept = []
    for word in text.split(" "):
        draw = rng.random() / FIFTH_OF_WORDS
        kept += [word] * (0 if draw < 0.5 else 2 if draw < 1 else 1)
    return " ".join(kept) or text


def flipped_case(text: str, rng: random.Random) -> str:
    return "".join(c.swapcase() if rng.random() < HALF_OF_LETTERS else c for c in text)


def between(benign: list[str], text: str, rng: random.Random) -> str:
    """Benign words before and after, together as many characters as the message has."""
    half = int(AS_LONG_AGAIN * len(text) / 2)
    before, after = (_stretch(benign, half, rng) for _ in range(2))
    return f"{before}\n{text}\n{after}"


def _stretch(benign: list[str], length: int, rng: random.Random) -> str:
    found = ""
    while len(found) < length:
        found = f"{found} {rng.choice(benign)}".strip()
    cut = found.find(" ", length)
    return found if cut < 0 else found[:cut]


def families(benign: list[str]) -> dict[str, Rewrite]:
    """By name, which is also the kind of `models.perturb` that it is like; `benign` is what pads."""
    return {
        "typo": half_of_the_words(Typo()),
        "homoglyph": half_of_the_words(Homoglyph()),
        "invisible": half_of_the_words(Invisible()),
        "leet": half_of_the_words(Leet()),
        "spacing": half_of_the_words(Spacing()),
        "padding": partial(between, benign),
        "words": dropped_and_doubled,
        "case": flipped_case,
        "url": partial(_mutated, UrlCloaking()),
    }


FAMILIES = tuple(families([]))
HELD = ("homoglyph",) if QUICK else FAMILIES


# --- messages -----------------------------------------------------------------------------------------------


def sms() -> tuple[list[str], Flags]:
    table = pl.read_parquet(f"{shared_data()}/uci_sms/uci_sms.parquet")
    return table["text"].to_list(), table["label"].to_numpy() == 1


def mail() -> tuple[list[str], Flags]:
    table = pl.read_parquet(f"{shared_data()}/spamassassin/spamassassin.parquet")
    text = (pl.col("subject").fill_null("") + "\n" + pl.col("body").fill_null("")).str.slice(
        0, MOST_CHARACTERS
    )
    return table.select(text).to_series().to_list(), table["label"].to_numpy() == 1


SETS = {"sms": sms, "mail": mail}


@dataclass(frozen=True)
class Fold:
    """Train and test of one fold; no near-duplicate is in both."""

    train: streams.Period
    test: streams.Period


def fold(name: str, number: int) -> Fold:
    texts, is_abuse = SETS[name]()
    canonical = [reading.canonical for reading in read_many(texts)]
    first = {text: i for i, text in reversed(list(enumerate(canonical)))}
    rows = np.array(sorted(first.values()))
    group = np.array([simhash(canonical[i]) for i in rows])
    _, group = np.unique(group, return_inverse=True)
    rng = np.random.default_rng(SEED)
    home = rng.integers(0, FOLDS, group.max() + 1)[group]
    kept = rng.random(len(rows)) < SHARE

    def part(chosen: Flags) -> streams.Period:
        mine = rows[chosen & kept]
        return streams.Period(
            [texts[i] for i in mine if is_abuse[i]], [texts[i] for i in mine if not is_abuse[i]]
        )

    return Fold(part(home != number), part(home == number))


@dataclass(frozen=True)
class Rewritten:
    """Messages that a family changed: which of the given ones, and what became of them."""

    of: NDArray[np.int64]
    texts: list[str]


def rewritten(texts: list[str], rewrite: Rewrite, seed: str) -> Rewritten:
    rng = random.Random(seed)
    made = [rewrite(text, rng) for text in texts]
    of = np.array([i for i, (a, b) in enumerate(zip(texts, made, strict=True)) if a != b], np.int64)
    return Rewritten(of, [made[i] for i in of])


# --- models: each scores texts after learning from a fold ---------------------------------------------------

Score = Callable[[list[str]], NDArray[np.float64]]


def ours(train: streams.Period, seed: int) -> Iterator[tuple[str, Score]]:
    """The detector by text alone, and with the features that follow from the text."""
    with tempfile.TemporaryDirectory(prefix="rq-robustness-") as folder:
        model = streams.detector([train], seed, None, Path(folder))
    yield "ours", lambda texts: model.score_texts(texts)[:, 0].astype(np.float64)
    yield "full", lambda texts: streams.scores(model, texts)[:, 0]


def ngrams(train: streams.Period, look: Callable[[list[str]], list[str]]) -> Score:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=300)
    model.fit(vectors.fit_transform(look(train.texts)), train.is_abuse)
    return lambda texts: model.decision_function(vectors.transform(look(texts)))


def minilm() -> Callable[[streams.Period], Score]:
    """A logistic regression on sentence vectors; of a message it reads 128 pieces."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    source = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    network = AutoModel.from_pretrained(source, local_files_only=True).eval()
    known: dict[str, NDArray[np.float32]] = {}

    def read(texts: list[str]) -> None:
        feeds = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            states = network(**feeds).last_hidden_state.float()
        mask = feeds["attention_mask"].unsqueeze(-1).float()
        mean = (states * mask).sum(1) / mask.sum(1)
        known.update(zip(texts, torch.nn.functional.normalize(mean, dim=1).numpy(), strict=True))

    def vectors(texts: list[str]) -> NDArray[np.float32]:
        new = sorted({text for text in texts if text not in known}, key=len)
        for start in range(0, len(new), 32):
            read(new[start : start + 32])
        return np.stack([known[text] for text in texts])

    def learnt(train: streams.Period) -> Score:
        model = LogisticRegression(C=10.0, max_iter=1000).fit(vectors(train.texts), train.is_abuse)
        return lambda texts: model.decision_function(vectors(texts))

    return learnt


# --- one piece of work, in a process of its own -------------------------------------------------------------


def judged(
    test: streams.Period, score: Score, names: tuple[str, ...], seed: str, benign_too: int = 0
) -> dict[str, Any]:
    """Which abuse was caught, as it was and by family, at the threshold of the clean benign messages; and how
    many of the first `benign_too` benign ones are over it, rewritten alike.
    """
    clean, benign = score(test.abuse), score(test.benign)
    cut = np.quantile(benign, 1 - FPR)
    found: dict[str, Any] = {"clean": (clean > cut).tolist(), "families": {}}
    known = families(test.benign)
    for name in names:
        bad = rewritten(test.abuse, known[name], f"{seed} {name}")
        good = rewritten(test.benign[:benign_too], known[name], f"{seed} {name}")
        found["families"][name] = {
            "before": (clean[bad.of] > cut).tolist(),
            "after": (score(bad.texts) > cut).tolist(),
            "benign": (score(good.texts) > cut).tolist() if good.texts else [],
        }
    return found


def detector(name: str, number: int, held: str | None) -> dict[str, Any]:
    """The detector on one fold; with `held`, a kind that its training did not see, on that family alone."""
    if held is not None:
        leave_out(held)
    parts = fold(name, number)
    names = FAMILIES if held is None else (held,)
    models = ours(parts.train, SEED + number)
    return {
        model: judged(parts.test, score, names, f"{name} {number}", BENIGN_REWRITTEN)
        for model, score in models
    }


def leave_out(kind: str) -> None:
    """Training without this kind of disturbance, for the rest of this process."""
    from models import perturb, shallow

    if kind == "padding":
        perturb.padded = lambda text, benign, most, pick: text
        shallow.PADDED = 0.0
        return
    perturb.KINDS.pop(kind)
    if kind == "typo":
        # The copies that weigh the parts are misspelt too.
        perturb.misspelt = lambda words, pick, share: words


def n_grams(name: str) -> list[dict[str, Any]]:
    """The n-gram models on each fold, of raw and of canonical text."""
    views = {"ngram_raw": list, "ngram": lambda texts: [reading.canonical for reading in read_many(texts)]}
    return _each_fold(name, {model: partial(ngrams, look=look) for model, look in views.items()})


def sentence_vectors(name: str) -> list[dict[str, Any]]:
    """MiniLM on each fold; a message that is in several is read once."""
    return _each_fold(name, {"minilm": minilm()})


def _each_fold(name: str, models: dict[str, Callable[[streams.Period], Score]]) -> list[dict[str, Any]]:
    folds = ((number, fold(name, number)) for number in range(TESTED))
    return [
        {
            model: judged(parts.test, learn(parts.train), FAMILIES, f"{name} {number}")
            for model, learn in models.items()
        }
        for number, parts in folds
    ]


def apart(jobs: list[Job]) -> list[Any]:
    """The outcome of each job, in order; what is left out of training stays out for the jobs after it."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(jobs)],
        stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **streams.ONE_THREAD},
    )  # fmt: skip
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- all of it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drop:
    """Recall before and after rewriting, and the mean of the difference with its 95% interval."""

    before: float
    after: float
    drop: float
    low: float
    high: float
    n: int


def drop(outcomes: list[dict[str, Any]], family: str) -> Drop:
    """Pooled over folds; no message is in two tests."""
    before, after = (
        np.concatenate([np.array(one["families"][family][side], float) for one in outcomes])
        for side in ("before", "after")
    )
    lost = before - after
    reach = 1.96 * float(lost.std()) / max(1, len(lost)) ** 0.5
    mean = float(lost.mean())
    return Drop(float(before.mean()), float(after.mean()), mean, mean - reach, mean + reach, len(lost))


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps([globals()[work](*arguments) for work, *arguments in json.loads(sys.argv[1])]))
        return
    minilm_folder()
    results: dict[Job, Any] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        batches = [batch for name in SETS for batch in work_on(name)]
        for batch, outcomes in zip(batches, pool.map(apart, batches), strict=True):
            for job, found in zip(batch, outcomes, strict=True):
                results[job] = found
                for one in found if isinstance(found, list) else [found]:
                    print(*job, _told(one), flush=True)
    finish(summary(results))


def work_on(name: str) -> list[list[Job]]:
    """All jobs of a set, in batches, a process each. Quick: one batch, or loading torch takes most of it."""
    jobs: list[Job] = [("detector", name, number, None) for number in range(TESTED)]
    jobs += [("n_grams", name), ("sentence_vectors", name)]
    jobs += [("detector", name, number, held) for held in HELD for number in range(HELD_TESTED)]
    return [jobs] if QUICK else [[job] for job in jobs]


def _told(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{model} {np.mean(one['clean']):.3f} "
        + " ".join(f"{name} {np.mean(f['after']):.3f}" for name, f in one["families"].items())
        for model, one in found.items()
    )


MODELS = {
    "ours": "detector", "full": "detector", "ngram_raw": "n_grams", "ngram": "n_grams",
    "minilm": "sentence_vectors",
}  # fmt: skip


def summary(results: dict[Job, Any]) -> dict[str, Any]:
    """Tables and figures."""
    seen: dict[str, dict[str, dict[str, Drop]]] = {}
    held: dict[str, dict[str, Drop]] = {}
    clean: dict[str, dict[str, float]] = {}
    fpr: dict[str, dict[str, float]] = {}
    for name in SETS:
        outcomes = {
            model: [_outcome(results, work, name, number)[model] for number in range(TESTED)]
            for model, work in MODELS.items()
        }
        clean[name] = {
            model: float(np.mean(np.concatenate([one["clean"] for one in some])))
            for model, some in outcomes.items()
        }
        seen[name] = {
            model: {family: drop(some, family) for family in FAMILIES} for model, some in outcomes.items()
        }
        held[name] = {
            family: drop(
                [results["detector", name, number, family]["ours"] for number in range(HELD_TESTED)], family
            )
            for family in HELD
        }
        fpr[name] = {
            family: float(
                np.mean(np.concatenate([one["families"][family]["benign"] for one in outcomes["ours"]]))
            )
            for family in FAMILIES
        }
        _tables(name, clean[name], seen[name], held[name], fpr[name])
    worst = max((one for part in seen.values() for one in part["ours"].values()), key=lambda d: d.drop)
    worst_held = max((one for part in held.values() for one in part.values()), key=lambda d: d.drop)
    return {
        "worst_drop": worst.drop,
        "worst_drop_high": worst.high,
        "heldout_drop": worst_held.drop,
        "heldout_drop_high": worst_held.high,
        "recall": {
            name: {"clean": clean[name]["ours"], **{f: d.after for f, d in part["ours"].items()}}
            for name, part in seen.items()
        },
        "drop": {name: {f: d.drop for f, d in part["ours"].items()} for name, part in seen.items()},
        "heldout": {name: {f: d.drop for f, d in part.items()} for name, part in held.items()},
        "fpr_rewritten": fpr,
        "peers": {
            name: {
                model: {"clean": clean[name][model], "worst_drop": max(d.drop for d in drops.values())}
                for model, drops in part.items()
                if model != "ours"
            }
            for name, part in seen.items()
        },
    }


def _outcome(results: dict[Job, Any], work: str, name: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = (
        results[work, name, number, None] if work == "detector" else results[work, name][number]
    )
    return found


def _tables(
    name: str,
    clean: dict[str, float],
    seen: dict[str, dict[str, Drop]],
    held: dict[str, Drop],
    fpr: dict[str, float],
) -> None:
    rows: list[tuple[object, ...]] = [("clean", "", *(f"{clean[model]:.3f}" for model in MODELS), "", "", "")]
    for family in FAMILIES:
        own = seen["ours"][family]
        out = held.get(family)
        rows.append(
            (
                family, own.n, *(f"{seen[model][family].after:.3f}" for model in MODELS), _interval(own),
                _interval(out) if out else "", f"{fpr[family]:.3f}",
            )
        )  # fmt: skip
    title = f"{name}: recall at {FPR:.0%} FPR, {TESTED} of {FOLDS} folds; held out in {HELD_TESTED}"
    columns = ("family", "n", *MODELS, "drop of ours", "drop, held out", "FPR, rewritten")
    show(title, columns, rows)


def _interval(one: Drop) -> str:
    return f"{one.drop:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


if __name__ == "__main__":
    main()

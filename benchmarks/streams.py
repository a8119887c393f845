"""Real streams of abuse that moved on for years: retrained each period on all that was known by then.

For each of two streams, `discord` (scam domains by quarter, from 2021Q4, rows without a reliable date left
out; benign domains spread over the quarters at random) and `enron` (spam by month, from 2003-12; ham shuffled
over the months), the first two periods make the first model, and every later period is predicted by models
that saw the periods before it. What is compared is recall at 1% false positives (the threshold that each
period's own benign messages give), the mean over the later periods, and over the seeds:

- `recall`: the whole detector as the training process makes it (`models.train`), by text alone.
- `recall_static`: its first model, never retrained. `recall_no_encoder`: trained without the encoder.
- `baseline`: TF-IDF of character n-grams within words and a logistic regression (scikit-learn), retrained as
  often; `strongest_baseline` names the n-grams, of three kinds the one that did best on these very periods.
- `gain`, `gain_low`, `gain_high`: the detector's recall less the baseline's, by seed and period, and the 95%
  interval of its mean over the seeds (Student's t). `encoder_gain`, `encoder_gain_low`: the same against the
  detector without its encoder.
- `fpr_fixed`: share of benign messages that the detector acts on at the thresholds it came with.

A seed decides where benign messages fall, and the training's own randomness. The model sees texts: no date,
mailbox, file or order within a period. `RQ_SHARED_DATA` points at other data of the same form;
`STREAM` names one of the two, `SEEDS` how many seeds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from common import QUICK, finish, shared_data, show
from numpy.typing import NDArray

FPR = 0.01
SEEDS = tuple(range(1, 1 + (1 if QUICK else int(os.environ.get("SEEDS", "5")))))
FIRST = 2
"""So many periods make the first model."""
MOST_PERIODS = 1 if QUICK else None
SHARE = 0.2 if QUICK else 1.0
N_GRAMS = ((2, 4), (2, 5), (1, 5))
POLICY = "abuse"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}


@dataclass(frozen=True)
class Period:
    """The messages of a quarter or a month."""

    abuse: list[str]
    benign: list[str]

    @property
    def texts(self) -> list[str]:
        return [*self.abuse, *self.benign]

    @property
    def is_abuse(self) -> NDArray[np.bool_]:
        return np.arange(len(self.texts)) < len(self.abuse)


# --- the streams --------------------------------------------------------------------------------------------


def discord(seed: int) -> list[Period]:
    """By quarter from 2021Q4."""
    folder = f"{shared_data()}/discord_scam_domains"
    scam = pl.read_parquet(f"{folder}/scam_domains.parquet").filter(~pl.col("bulk") & ~pl.col("bulk_day"))
    quarter = pl.col("date").dt.truncate("1q").dt.date()
    scam = scam.sort("date").unique("text", keep="first", maintain_order=True).with_columns(period=quarter)
    scam = scam.filter(pl.col("period") >= datetime(2021, 10, 1).date())
    benign = pl.read_parquet(f"{folder}/benign_domains.parquet")["text"].unique().sort()
    return _periods(scam, benign.to_list(), seed)


def enron(seed: int) -> list[Period]:
    """By month from 2003-12; subject and body."""
    mail = pl.read_parquet(f"{shared_data()}/enron_spam/enron_spam.parquet").with_columns(
        text=pl.col("subject").fill_null("") + "\n" + pl.col("body").fill_null(""),
        period=pl.col("date").dt.truncate("1mo").dt.date(),
    )
    spam = mail.filter((pl.col("label") == 1) & (pl.col("period") >= datetime(2003, 12, 1).date()))
    ham = mail.filter(pl.col("label") == 0)["text"]
    return _periods(spam, ham.to_list(), seed)


def _periods(abuse: pl.DataFrame, benign: list[str], seed: int) -> list[Period]:
    rng = np.random.default_rng(seed)
    names = abuse["period"].unique().sort().to_list()
    where = rng.integers(0, len(names), len(benign))
    found = []
    for i, name in enumerate(names):
        texts = abuse.filter(pl.col("period") == name)["text"].to_list()
        others = [benign[j] for j in np.flatnonzero(where == i)]
        kept = [[t for t in part if rng.random() < SHARE] for part in (texts, others)]
        found.append(Period(*kept))
    return found


STREAMS = {"discord": discord, "enron": enron}


# --- one model ----------------------------------------------------------------------------------------------


def training_set(known: list[Period], path: Path, seed: int) -> None:
    """What was known, as the training process reads it; within a period the order means nothing."""
    from redqueen import features, trainingset
    from redqueen.schema import TABLES

    rng = np.random.default_rng([seed, len(known)])
    start, rows = datetime(2026, 1, 1, tzinfo=UTC), []
    for number, period in enumerate(known):
        moments = np.sort(rng.integers(0, 86_400_000_000, len(period.texts)))
        order = rng.permutation(len(period.texts))
        for moment, i in zip(moments, order, strict=True):
            at = start + timedelta(days=number, microseconds=int(moment))
            rows.append((f"e{len(rows):06}", at, period.texts[i], float(i < len(period.abuse))))
    names = ("event_id", "ts", "text", "p_abuse")
    table = pl.DataFrame(rows, schema=names, orient="row")
    at = table["ts"].cast(pl.Datetime("us", "UTC"))
    empty = pl.from_arrow(TABLES["events"].empty_table())
    assert isinstance(empty, pl.DataFrame)
    events = pl.concat(
        [
            empty,
            table.select("event_id", "text", ts=at, received_at=at, kind=pl.lit("message")),
        ],
        how="diagonal_relaxed",
    )
    gold = table.select("event_id", "p_abuse", policy=pl.lit(POLICY), mature=pl.lit(True))
    built = trainingset.build(
        gold, events, features.featurise(events), pl.DataFrame(),
        policies=(POLICY,), feature_names=features.ACTORLESS, max_rows=10**9,
    )  # fmt: skip
    built.rows.write_parquet(path)


def detector(known: list[Period], seed: int, encoder: str | None, folder: Path) -> Any:
    """What the training process makes of the known periods."""
    from models.detector import Detector
    from models.train import TrainingSpec, train
    from redqueen.features import ACTORLESS, FEATURES_VERSION
    from redqueen.settings import Settings

    fields = Settings.model_fields
    path = folder / "dataset.parquet"
    training_set(known, path, seed)
    spec = TrainingSpec(
        dataset=str(path), out=str(folder / "work"), policies=(POLICY,), feature_names=ACTORLESS,
        features_version=FEATURES_VERSION, fpr_budget=FPR, encoder=encoder, seed=seed,
        layers=fields["encoder_layers"].default, width=fields["encoder_width"].default,
        heads=fields["encoder_heads"].default, max_tokens=fields["max_tokens"].default,
        epochs=fields["train_epochs"].default, examples=fields["train_examples"].default,
    )  # fmt: skip
    return Detector.load(train(spec))


def scores(model: Any, texts: list[str]) -> NDArray[np.float64]:
    """By text alone, with the features that follow from the text."""
    from redqueen import features
    from redqueen.schema import TABLES

    empty = pl.from_arrow(TABLES["events"].empty_table())
    assert isinstance(empty, pl.DataFrame)
    at = pl.lit(datetime(2026, 1, 1, tzinfo=UTC)).cast(pl.Datetime("us", "UTC"))
    ids = pl.Series("event_id", [f"t{i}" for i in range(len(texts))])
    events = pl.DataFrame([ids, pl.Series("text", texts)]).with_columns(
        ts=at, received_at=at, kind=pl.lit("message")
    )
    events = pl.concat([empty, events], how="diagonal_relaxed")
    table = ids.to_frame().join(features.featurise(events), on="event_id", how="left", maintain_order="left")
    return model.score(texts, table.select(features.ACTORLESS).to_numpy()).astype(np.float64)


def recall(score: NDArray[np.float64], is_abuse: NDArray[np.bool_]) -> float:
    """At the threshold that 1% of the benign messages exceed."""
    return float((score[is_abuse] > np.quantile(score[~is_abuse], 1 - FPR)).mean())


# --- one piece of work, in a process of its own -------------------------------------------------------------


def ours(stream: str, seed: int, known: int) -> dict[str, float]:
    """The detector that knew so many periods, on the next one; the first one on all."""
    periods = STREAMS[stream](seed)
    found: dict[str, float] = {}
    for name, encoder in (("recall", None), ("recall_no_encoder", "none")):
        with tempfile.TemporaryDirectory(prefix="rq-streams-") as folder:
            model = detector(periods[:known], seed, encoder, Path(folder))
        score = scores(model, periods[known].texts)[:, 0]
        is_abuse = periods[known].is_abuse
        found[name] = recall(score, is_abuse)
        if encoder is None:
            found["fpr_fixed"] = float((score[~is_abuse] >= model.thresholds[0]).mean())
            if known == FIRST:
                later = periods[FIRST:][:MOST_PERIODS]
                static = [recall(scores(model, p.texts)[:, 0], p.is_abuse) for p in later]
                found["recall_static"], found["last_static"] = float(np.mean(static)), static[-1]
    return found


def baseline(stream: str, seed: int, known: int) -> dict[str, float]:
    """The n-gram logistic regressions that knew so many periods, on the next one."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    periods = STREAMS[stream](seed)
    texts = [text for period in periods[:known] for text in period.texts]
    is_abuse = np.concatenate([period.is_abuse for period in periods[:known]])
    found = {}
    for n in N_GRAMS:
        vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=n, min_df=2, sublinear_tf=True)
        model = LogisticRegression(C=10.0, max_iter=300).fit(vectors.fit_transform(texts), is_abuse)
        score = model.decision_function(vectors.transform(periods[known].texts))
        found[f"{n[0]} to {n[1]}"] = recall(score, periods[known].is_abuse)
    return found


def apart(work: str, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([work, *arguments])],
        stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **ONE_THREAD},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


# --- all of it ----------------------------------------------------------------------------------------------


def main() -> None:
    if len(sys.argv) > 1:
        work, *arguments = json.loads(sys.argv[1])
        print(json.dumps(globals()[work](*arguments)))
        return
    chosen = os.environ.get("STREAM", " ".join(STREAMS)).split()
    figures = {name: measure(name) for name in chosen}
    rows = [
        (key, *(figures[name][key] for name in chosen))
        for key in next(iter(figures.values()))
        if key != "by_period"
    ]
    show("streams", ["figure", *chosen], rows)
    finish(figures)


def measure(stream: str) -> dict[str, Any]:
    """Every seed and later period of a stream, two at a time."""
    n_periods = len(STREAMS[stream](SEEDS[0]))
    later = list(range(FIRST, n_periods))[:MOST_PERIODS]
    jobs = [(seed, known) for known in later for seed in SEEDS]
    results: dict[str, dict[tuple[int, int], dict[str, float]]] = {"ours": {}, "baseline": {}}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for work, found in results.items():
            for job, one in zip(
                jobs, pool.map(lambda job, work=work: apart(work, stream, *job), jobs), strict=True
            ):
                found[job] = one
                print(
                    f"{stream}, {work}, seed {job[0]}, period {job[1] + 1} of {n_periods}: {_told(one)}",
                    flush=True,
                )
    return summary(results["ours"], results["baseline"], later)


def _told(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def summary(
    ours: dict[tuple[int, int], dict[str, float]],
    theirs: dict[tuple[int, int], dict[str, float]],
    later: list[int],
) -> dict[str, Any]:
    """The figures of one stream."""
    strongest = max(next(iter(theirs.values())), key=lambda n: np.mean([one[n] for one in theirs.values()]))

    def by_seed(values: dict[tuple[int, int], float]) -> list[float]:
        return [float(np.mean([values[seed, known] for known in later])) for seed in SEEDS]

    def of(name: str) -> dict[tuple[int, int], float]:
        return {job: one[name] for job, one in ours.items()}

    base = {job: one[strongest] for job, one in theirs.items()}
    gain = by_seed({job: of("recall")[job] - base[job] for job in base})
    earned = by_seed({job: of("recall")[job] - of("recall_no_encoder")[job] for job in base})
    static = [one["recall_static"] for (_, known), one in ours.items() if known == FIRST]
    low, high = interval(gain)
    return {
        "recall": float(np.mean(by_seed(of("recall")))),
        "recall_static": float(np.mean(static)),
        "recall_static_last": float(
            np.mean([one["last_static"] for one in ours.values() if "last_static" in one])
        ),
        "recall_no_encoder": float(np.mean(by_seed(of("recall_no_encoder")))),
        "baseline": float(np.mean(by_seed(base))),
        "strongest_baseline": strongest,
        "gain": float(np.mean(gain)),
        "gain_low": low,
        "gain_high": high,
        "encoder_gain": float(np.mean(earned)),
        "encoder_gain_low": interval(earned)[0],
        "fpr_fixed": float(np.mean(by_seed(of("fpr_fixed")))),
        "fpr_fixed_worst": max(of("fpr_fixed").values()),
        "seeds": len(SEEDS),
        "by_period": {
            name: [float(np.mean([values[seed, known] for seed in SEEDS])) for known in later]
            for name, values in (
                ("recall", of("recall")),
                ("recall_no_encoder", of("recall_no_encoder")),
                ("baseline", base),
            )
        },
    }


def interval(values: list[float]) -> tuple[float, float]:
    """The 95% interval of a mean (Student's t); nothing is known of one value's spread."""
    from scipy.stats import t

    if len(values) < 2:
        return -1.0, 1.0
    reach = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)) - reach, float(np.mean(values)) + reach


if __name__ == "__main__":
    main()

"""Aggregation of labels against crowd-kit, a day's increment against a refit, and rings against the guard.

- `speedup`, `max_dp`: 1M simulated votes (quick: 0.3M) through the textbook Dawid-Skene and crowd-kit's, both
  as they come (100 iterations at most, the same stop). CPU seconds of fitting alone, each in its own process;
  greatest difference of any posterior.
- `accuracy`: real crowds with known truth; for ConvAbuse, which has none, the share of a held-out annotator's
  votes that the others' fused labels foretell, over all annotators.
- `incremental_*`: a year of labels from sources of all kinds, raters and events Zipf. A refit a week ago and
  seven daily increments (as the schedules have it) against a refit now: share of (event, policy) pairs whose
  verdict differs, and the mean CPU of an increment over that of the refit. Reading the state back and keeping
  the increment are `incremental_load` and `incremental_persist`, also over the refit.
- rings: see `label_rings`.

crowd-kit lives in `.bench/crowdkit`, made here from the package index.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import label_rings as rings
import numpy as np
import polars as pl
from common import QUICK, best_of, finish, shared_data, show

from redqueen.aggregation import TEXTBOOK, Fusion, Panel, Priors, dawid_skene
from redqueen.settings import Settings
from redqueen.store import DirectoryStore
from redqueen.truth import TruthState, save, saved

CROWDKIT = "crowd-kit==1.4.1"
T = TypeVar("T")

REPEATS = 1 if QUICK else 3
VOTES = 300_000 if QUICK else 1_000_000
YEAR = 450_000 if QUICK else 1_450_000
"""Judgements; some two thirds are told, the rest would have been reports of nothing."""

PEER = """
import json, sys, time
import numpy as np, pandas as pd
from crowdkit.aggregation import DawidSkene

for line in sys.stdin:
    path, repeats = json.loads(line)
    votes = np.load(path)
    frame = pd.DataFrame({"task": votes["item"], "worker": votes["rater"], "label": votes["said"]})
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        model = DawidSkene().fit(frame)
        taken.append(time.process_time() - start)
    p = model.probas_.sort_index()
    told = {"p": p.to_numpy(), "classes": p.columns.to_numpy(), "n": len(model.loss_history_)}
    np.savez(path + ".out.npz", s=min(taken), **told)
    print("done", flush=True)
"""


class CrowdKit:
    """crowd-kit in a process and an environment of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = Path(__file__).resolve().parents[1] / ".bench" / "crowdkit"
        python = home / "bin" / "python"
        if not (home / "ready").exists():
            venv.create(home, with_pip=True, clear=True)
            subprocess.run([python, "-m", "pip", "install", "-q", CROWDKIT], check=True)
            (home / "ready").write_text(CROWDKIT)
        self.process = subprocess.Popen(
            [python, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def fit(self, panel: Panel, repeats: int = 1) -> tuple[np.ndarray, int, float]:
        """Posteriors (by all classes of the panel), iterations, CPU seconds."""
        path = str(self.folder / f"{time.monotonic_ns()}.npz")
        np.savez(path, item=panel.item, rater=panel.rater, said=panel.said)
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([path, repeats]) + "\n")
        self.process.stdin.flush()
        if self.process.stdout.readline().strip() != "done":
            raise SystemExit("crowd-kit failed; its error is above")
        out = np.load(path + ".out.npz")
        p = np.zeros((panel.n_items, panel.n_classes))
        p[:, out["classes"]] = out["p"]
        return p, int(out["n"]), float(out["s"])

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def simulated(n: int, seed: int = 1) -> Panel:
    """Votes on `n / 5` items, raters Zipf and of all qualities."""
    rng = np.random.default_rng(seed)
    items, raters = n // 5, 5_000
    truth = rng.random(items) < 0.3
    item = np.concatenate([np.arange(items), rng.integers(0, items, n - items)])
    rater = zipf(rng, 1.1, raters, n)
    right = rng.random(n) < rng.uniform(0.6, 0.95, raters)[rater]
    said = np.where(right, truth[item], ~truth[item]).astype(np.intp)
    order = rng.permutation(n)
    return Panel(item[order], rater[order], said[order], items, raters, 2)


def speed(peer: CrowdKit) -> dict[str, object]:
    panel = simulated(VOTES)
    theirs, iterations, seconds = peer.fit(panel, REPEATS)
    ours = dawid_skene(panel)
    taken = best_of(lambda: dawid_skene(panel), REPEATS)
    max_dp = float(np.abs(ours.p - theirs).max())
    show(
        f"{VOTES:,} votes, {panel.n_items:,} items, {panel.n_raters:,} raters",
        ("", "CPU s", "iterations"),
        [("crowd-kit", seconds, iterations), ("red queen", taken, len(ours.loss))],
    )
    return {"speedup": seconds / taken, "max_dp": max_dp}


def coded(rows: pl.DataFrame, classes: list[str]) -> tuple[Panel, list[str]]:
    """`item, worker, answer` as codes, and the items in the order of their codes."""
    items, raters = (rows[name].unique().sort().to_list() for name in ("item", "worker"))

    def codes(name: str, known: list[str]) -> np.ndarray:
        places = {value: code for code, value in enumerate(known)}
        return rows[name].replace_strict(places, return_dtype=pl.Int64).to_numpy().astype(np.intp)

    item, rater, said = codes("item", items), codes("worker", raters), codes("answer", classes)
    return Panel(item, rater, said, len(items), len(raters), len(classes)), items


def verdicts(p: np.ndarray, items: list[str], classes: list[str]) -> pl.DataFrame:
    """The most probable class of each item; of equals, but for what a sum's order moves, the first."""
    best = np.round(p, 9).argmax(axis=1)
    return pl.DataFrame({"item": items, "verdict": [classes[i] for i in best]})


def accuracy(peer: CrowdKit) -> dict[str, dict[str, float]]:
    folder = f"{shared_data()}/annotators"
    crowds = pl.read_parquet(f"{folder}/truth_inference.parquet")
    found: dict[str, dict[str, float]] = {}
    pooled = Priors(rater_votes=Fusion().rater_votes)
    for (name,), rows in crowds.group_by("dataset", maintain_order=True):
        classes = sorted(rows["answer"].unique())
        panel, items = coded(rows, classes)
        truth = rows.group_by("item").agg(pl.col("truth").first())

        def right(p: np.ndarray, items=items, classes=classes, truth=truth) -> float:
            told = verdicts(p, items, classes).join(truth, on="item")
            return float((told["verdict"] == told["truth"]).mean())

        ours, shrunk = (dawid_skene(panel, priors).p for priors in (TEXTBOOK, pooled))
        found[str(name)] = {
            "ours": right(ours), "theirs": right(peer.fit(panel)[0]), "ours_pooled": right(shrunk),
            "votes": panel.item.size, "classes": panel.n_classes,
        }  # fmt: skip
    found |= convabuse(peer, f"{folder}/convabuse_full.parquet", pooled)
    show(
        "Accuracy on real crowds",
        ("data set", "votes", "classes", "red queen", "crowd-kit", "raters shrunk to the crowd"),
        [(n, f["votes"], f["classes"], f["ours"], f["theirs"], f["ours_pooled"]) for n, f in found.items()],
    )
    return {name: {key: f[key] for key in ("ours", "theirs")} for name, f in found.items()}


def convabuse(peer: CrowdKit, path: str, pooled: Priors) -> dict[str, dict[str, float]]:
    """ConvAbuse has annotators and no truth: foretell each annotator from the others."""
    levels = ["1", "0", "-1", "-2", "-3"]
    marked = pl.sum_horizontal(pl.col(f"is_abuse.{x}") == "1" for x in levels)
    marks = pl.read_parquet(path).filter(marked == 1)
    said = pl.struct("conv_id", "prev_agent", "prev_user", "agent", "user").rank("dense").cast(pl.String)
    level = pl.coalesce(pl.when(pl.col(f"is_abuse.{x}") == "1").then(pl.lit(x)) for x in levels)
    rows = marks.select(item=said, worker="annotator_id", answer=level).unique(["item", "worker"])
    abusive = pl.when(pl.col("answer").str.starts_with("-")).then(pl.lit("abuse")).otherwise(pl.lit("fine"))
    found = {}
    for name, told in (
        ("ConvAbuse, abuse or not", rows.with_columns(answer=abusive)),
        ("ConvAbuse, severity", rows),
    ):
        classes = sorted(told["answer"].unique())
        hits = np.zeros(3)
        for worker in sorted(told["worker"].unique()):
            panel, items = coded(told.filter(pl.col("worker") != worker), classes)
            own = told.filter(pl.col("worker") == worker)
            fits = (dawid_skene(panel).p, peer.fit(panel)[0], dawid_skene(panel, pooled).p)
            for place, p in enumerate(fits):
                judged = own.join(verdicts(p, items, classes), on="item")
                hits[place] += (judged["verdict"] == judged["answer"]).sum()
        n = told.join(told.group_by("item").len().filter(pl.col("len") > 1), on="item", how="semi").height
        found[name] = dict(zip(("ours", "theirs", "ours_pooled"), hits / n, strict=True))
        found[name] |= {"votes": told.height, "classes": len(classes)}
    return found


def zipf(rng: np.random.Generator, exponent: float, known: int, n: int) -> np.ndarray:
    """`n` draws of `known` things, the k-th as popular as `k ** -exponent`."""
    heap = np.cumsum(np.arange(1, known + 1) ** -exponent)
    return np.searchsorted(heap, rng.random(n) * heap[-1])


SOURCES = {"report": 0.5, "audit": 0.1, "moderator": 0.15, "vendor": 0.15, "rule": 0.09, "honeypot": 0.01}
SKILL = {"report": 0.8, "audit": 0.97, "moderator": 0.97, "vendor": 0.9, "rule": 0.8, "honeypot": 0.99}


def year(n: int, policies: tuple[str, ...], end: datetime, seed: int = 1) -> pl.DataFrame:
    """A year of labels: popular events get many, raters are Zipf within their source and differ in skill.

    Reports and honeypots only ever say "abuse": whoever would say "benign" there says nothing.
    """
    rng = np.random.default_rng(seed)
    items, raters = n // 2, n // 200
    truth = rng.random(items) < 0.3
    event = rng.permutation(items)[np.concatenate([np.arange(items), zipf(rng, 1.1, items, n - items)])]
    source = rng.choice(len(SOURCES), n, p=list(SOURCES.values()))
    rater = zipf(rng, 1.1, raters, n)
    skill = np.array(list(SKILL.values()))[source]
    skill = skill + rng.normal(0, 0.06, (len(SOURCES), raters))[source, rater]
    says = np.where(rng.random(n) < np.clip(skill, 0.5, 0.995), truth[event], ~truth[event])
    names = np.array(list(SOURCES))
    late = rng.exponential(36_000, n)
    seconds = rng.integers(0, 365 * 86_400, items)[event] + late
    start = np.datetime64((end - timedelta(days=365)).replace(tzinfo=None), "us")
    at = start + (seconds * 1e6).astype("timedelta64[us]")
    rows = pl.DataFrame(
        {
            "label_id": np.arange(n), "event_id": event, "rater_id": rater, "source": names[source],
            "abuse": says,
            "policy": np.array(policies)[rng.integers(0, len(policies), items)[event]],
            "labeled_at": at, "received_at": at,
        }
    )  # fmt: skip
    one_sided = pl.col("source").is_in(["report", "honeypot"])
    return rows.filter(pl.col("abuse") | ~one_sided).select(
        pl.format("label-{}", "label_id").alias("label_id"),
        pl.format("event-{}", "event_id").alias("event_id"),
        pl.when("abuse").then("policy").otherwise(pl.lit("any")).alias("policy"),
        pl.when("abuse").then(pl.lit("abuse")).otherwise(pl.lit("benign")).alias("value"),
        "source",
        pl.format("{}-{}", "source", "rater_id").alias("rater_id"),
        pl.col("labeled_at", "received_at").dt.replace_time_zone("UTC"),
        pl.lit(None, pl.Float64).alias("confidence"),
    )


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of one call, and what it gave."""
    start = time.process_time()
    given = work()
    return time.process_time() - start, given


def incremental(folder: Path) -> dict[str, object]:
    policies, end = Settings().policies, datetime(2026, 6, 1, tzinfo=UTC)
    labels = year(YEAR, policies, end).filter(pl.col("received_at") <= end)
    store = DirectoryStore(folder)
    week_ago = end - timedelta(days=7)
    state = save(store, TruthState.fit(labels, week_ago, policies))
    refit_s, exact = timed(lambda: TruthState.fit(labels, end, policies))
    taken, persisted, fresh = [], [], 0
    for day in range(1, 8):
        until = week_ago + timedelta(days=day)
        news = labels.filter((pl.col("received_at") > state.as_of) & (pl.col("received_at") <= until))
        spent, grown = timed(lambda news=news, until=until, state=state: state.update(news, until))
        kept, state = timed(lambda grown=grown, state=state: save(store, grown, state))
        taken.append(spent)
        persisted.append(kept)
        fresh += news.height
    load_s, again = timed(lambda: saved(store, end, policies))
    assert again is not None
    assert again.items().equals(state.items())
    ours, theirs = state.items(), exact.items()
    assert ours.drop("p_abuse", "disagreement").equals(theirs.drop("p_abuse", "disagreement"))
    flips = float(((ours["p_abuse"] >= 0.5) != (theirs["p_abuse"] >= 0.5)).mean())
    figures = {
        "incremental_time": float(np.mean(taken)) / refit_s,
        "incremental_flips": flips,
        "incremental_persist": float(np.mean(persisted)) / refit_s,
        "incremental_load": load_s / refit_s,
    }
    show(
        f"{labels.height:,} labels of a year, {ours.height:,} (event, policy) pairs, "
        f"{exact.learnt.records.height:,} raters' records; a refit, then 7 days of {fresh // 7:,}",
        ("", "CPU s", "of the refit"),
        [
            ("refit", refit_s, 1.0),
            ("a day's increment", float(np.mean(taken)), figures["incremental_time"]),
            ("keeping it", float(np.mean(persisted)), figures["incremental_persist"]),
            ("reading the state back", load_s, figures["incremental_load"]),
            ("share of verdicts that differ after the week", "", flips),
        ],
    )
    return figures


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        peer = CrowdKit(Path(scratch))
        figures = {**speed(peer), "accuracy": accuracy(peer)}
        peer.close()
        figures |= incremental(Path(scratch) / "store")
    figures |= rings.run(QUICK)
    finish(figures)


if __name__ == "__main__":
    sys.exit(main())

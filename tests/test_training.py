"""What the training process promises: limits kept, kills survived, figures shown, an honest warm start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
from dagster import (
    AssetKey,
    AssetRecordsFilter,
    DagsterInstance,
    MaterializeResult,
    PipesSubprocessClient,
    asset,
    materialize,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from models import bundle
from models.dataset import unheard_of
from models.detector import Detector
from models.tokens import View
from models.train import FAILURE, TrainingSpec, train
from redqueen.errors import InvalidInput
from tests.toy_model import FEATURES, POLICIES, dataset, matrix, messages, spec, toy_bundle

COMMAND = [sys.executable, "-m", "models.train"]


def result_of(folder: Path) -> dict[str, Any]:
    """What a training says beside its bundle."""
    found: dict[str, Any] = json.loads((folder.parent / "result.json").read_text())
    return found


# -- the spec ------------------------------------------------------------------------------------------------


def test_a_spec_travels_as_json(tmp_path: Path) -> None:
    plan = spec(tmp_path)
    assert TrainingSpec.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(InvalidInput, match="layer_count"):
        TrainingSpec.from_dict({**plan.to_dict(), "layer_count": 3})
    with pytest.raises(InvalidInput, match="incomplete"):
        TrainingSpec.from_dict({"out": "x"})


def test_limits_and_places_do_not_decide_what_is_learnt(tmp_path: Path) -> None:
    from models.encoding import digest

    plan = spec(tmp_path)
    same: dict[str, Any] = {"out": "/elsewhere", "seconds": 9.0, "memory_mb": 900, "checkpoint_seconds": 1.0}
    assert digest(replace(plan, **same)) == digest(plan)
    others: list[dict[str, Any]] = [
        {"seed": 8},
        {"parent": "m-1"},
        {"warm_start": True},
        {"epochs": 4},
        {"examples": 9},
    ]
    for other in others:
        assert digest(replace(plan, **other)) != digest(plan)


# -- with and without an encoder -----------------------------------------------------------------------------


def test_without_an_encoder_it_trains_verifies_and_serves(tmp_path: Path) -> None:
    folder = train(spec(tmp_path, encoder="none"))
    manifest = bundle.verify(folder)
    assert not set(bundle.ENCODER_FILES) & manifest.files.keys()
    assert result_of(folder)["curve"] == []
    served, rows = Detector.load(folder), messages(1000, seed=95)
    abusive = np.array([m.policy is not None for m in rows])
    acted = served.decide(served.score([m.text for m in rows], matrix(rows)))
    assert acted[abusive].mean() > 0.8
    assert acted[~abusive].mean() < 0.02 * 3
    assert "Encoder: none" in (folder / bundle.CARD).read_text()


# -- epochs --------------------------------------------------------------------------------------------------


def test_it_stops_early_where_there_is_nothing_to_learn_and_keeps_the_best_epoch(tmp_path: Path) -> None:
    from models.dataset import load, split
    from models.encoder import logits
    from models.encoding import Encoding
    from models.training import settle_torch

    settle_torch()
    plan = spec(tmp_path, epochs=40, feature_names=())
    table = pl.read_parquet(dataset(Path(plan.dataset), n=400))
    order = np.random.default_rng(0).permutation(table.height)
    table.with_columns(table[c][order] for c in ("p_spam", "p_scam")).write_parquet(plan.dataset)
    Path(plan.out).mkdir()
    data = load(plan)
    encoding = Encoding(plan, data, split(data, plan.seed), list, lambda event: None)
    rehearsed = encoding.rehearse(data.views[:9])
    losses = [point["validation_loss"] for point in encoding.place.curve]
    assert encoding.place.stopped == "early"
    assert len(losses) < 20
    assert encoding.place.best == 1 + int(np.argmin(losses)) < len(losses)
    kept = Encoding(replace(plan, epochs=40), data, split(data, plan.seed), list, lambda event: None)
    np.testing.assert_array_equal(kept.rehearse([]), rehearsed)
    np.testing.assert_array_equal(logits(kept.trainer.model, kept.reader, data.views[:9]), rehearsed)


def test_a_small_set_is_gone_through_more_often(tmp_path: Path) -> None:
    from models.encoding import epochs_of

    plan = spec(tmp_path, epochs=3, examples=40_000)
    assert [epochs_of(plan, n) for n in (0, 100, 9_000, 14_000, 20_000)] == [12, 12, 5, 3, 3]
    assert epochs_of(replace(plan, epochs=20), 100) == 20
    assert epochs_of(replace(plan, encoder="some/pretrained"), 100) == 3


def test_padding_comes_from_benign_messages_that_were_there_before(tmp_path: Path) -> None:
    from models.dataset import load
    from models.shallow import _padded

    plan = spec(tmp_path, feature_names=())
    table = pl.read_parquet(plan.dataset).sort("ts")
    # Every word says which message it is of; each tenth message has none.
    numbered = [" ".join([f"w{i}x"] * 4) if i % 10 else "" for i in range(table.height)]
    table.with_columns(text=pl.Series(numbered)).write_parquet(plan.dataset)
    data = load(plan)
    rows = np.arange(0, len(data.texts), 2)
    chosen, texts = _padded(data, rows, seed=1)
    assert len(chosen) > 0.2 * len(rows)
    assert (np.diff(chosen) > 0).all()
    assert not data.wordless[chosen].any()
    for row, text in zip(chosen.tolist(), texts, strict=True):
        words = text.split()
        others = {int(word[1:-1]) for word in words} - {row}
        assert words.count(f"w{row}x") == 4
        assert 4 < len(words) <= 8
        assert all(other < row and other in rows and not data.abusive[other] for other in others)


def test_an_infinite_feature_is_one_that_is_not_known(tmp_path: Path) -> None:
    from models.dataset import load

    plan = spec(tmp_path)
    table = pl.read_parquet(plan.dataset)
    table.with_columns(
        f_rate=pl.when(pl.int_range(table.height) < 20).then(np.inf).otherwise("f_rate")
    ).write_parquet(plan.dataset)
    features = load(plan).features
    assert features is not None
    assert not np.isinf(features).any()
    assert np.isnan(features[:, 0]).sum() == 20
    assert not np.isnan(features[:, 1]).any()


def test_what_is_held_or_comes_later_never_pads_what_the_encoder_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import encoder
    from models.dataset import load, split
    from models.encoding import Encoding

    plan = spec(tmp_path, epochs=2, examples=1)
    data = load(plan)
    parts = split(data, plan.seed)
    pools: list[set[int]] = []

    def noted(read: Any, texts: Any, rows: Any, benign: np.ndarray, *rest: Any) -> list[View]:
        pools.append({*benign.tolist()})
        return [read[row] for row in rows]

    monkeypatch.setattr(encoder, "disturbed", noted)
    Path(plan.out).mkdir()
    encoding = Encoding(plan, data, parts, list, lambda event: None)
    encoding.rehearse([])
    rehearsed = len(pools)
    encoding.refresh()
    assert all(pool and pool <= {*parts.older.tolist()} for pool in pools[:rehearsed])
    assert pools[rehearsed:]
    assert all(not pool & {*parts.held.tolist()} for pool in pools)


def test_at_its_limit_of_time_it_stops_with_a_whole_model_and_says_so(tmp_path: Path) -> None:
    folder = train(spec(tmp_path, seconds=0.01))
    result = result_of(folder)
    assert result["metrics"]["training"]["stopped"] == "time"
    assert result["curve"][0]["epoch"] < 1
    assert len(result["curve"]) == 2
    assert bundle.verify(folder).model_id == result["model_id"]
    assert np.isfinite(Detector.load(folder).score(["claim free gift"], [[2.0, -1.0]])).all()


# -- the process ---------------------------------------------------------------------------------------------


def test_beyond_its_limit_of_memory_the_process_ends_and_names_limit_and_setting(tmp_path: Path) -> None:
    plan = spec(tmp_path, memory_mb=100)
    (tmp_path / "spec.json").write_text(json.dumps(plan.to_dict()))
    done = subprocess.run(
        [*COMMAND, "--spec", str(tmp_path / "spec.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    for told in (done.stderr, json.loads((Path(plan.out) / FAILURE).read_text())["error"]):
        assert "its limit is 100 MiB" in told
        assert "RQ_TRAINING_MEMORY_MB" in told


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model_and_another_does_not(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    (tmp_path / "other").mkdir()
    first = bundle.verify(toy_bundle()).model_id
    assert bundle.verify(train(spec(tmp_path / "again"))).model_id == first
    assert bundle.verify(train(spec(tmp_path / "other", seed=8))).model_id != first


def places(file: Path) -> Iterator[dict[str, Any]]:
    """How far a training has come, by its checkpoint, again and again."""
    while True:
        if file.exists():
            with safetensors.safe_open(file, "np") as saved:
                yield json.loads(saved.metadata()["place"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "reached",
    [lambda at: at["epoch"] == 1 and at["step"] >= 3, lambda at: at["rehearsed"] and at["step"] >= 3],
    ids=["amid an epoch", "amid the refresh"],
)
def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(
    tmp_path: Path, reached: Callable[[dict[str, Any]], bool]
) -> None:
    plan = spec(tmp_path, checkpoint_seconds=0.0)
    (tmp_path / "spec.json").write_text(json.dumps(plan.to_dict()))
    with subprocess.Popen(
        [*COMMAND, "--spec", str(tmp_path / "spec.json")], stdout=subprocess.DEVNULL
    ) as process:
        next(at for at in places(Path(plan.out) / "checkpoint.safetensors") if reached(at))
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    told: list[str] = []
    folder = train(replace(plan, checkpoint_seconds=9.0), lambda event: told.append(event["stage"]))
    assert any(stage.startswith("resumed after epoch") and stage.endswith("steps") for stage in told)
    assert bundle.verify(folder).model_id == bundle.verify(toy_bundle()).model_id


@pytest.mark.parametrize("left", [b"", b"half a header"])
def test_a_damaged_checkpoint_is_none(tmp_path: Path, left: bytes) -> None:
    plan = spec(tmp_path, checkpoint_seconds=9.0)
    Path(plan.out).mkdir()
    (Path(plan.out) / "checkpoint.safetensors").write_bytes(left)
    told: list[str] = []
    folder = train(plan, lambda event: told.append(event["stage"]))
    assert any(stage.startswith("starts anew: the checkpoint is damaged") for stage in told)
    assert bundle.verify(folder).model_id == bundle.verify(toy_bundle()).model_id


def test_an_encoder_that_diverges_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.encoder import Trainer

    learn = Trainer._step
    losses = iter(range(10_000))
    monkeypatch.setattr(Trainer, "_step", lambda *given: float("nan") if next(losses) == 9 else learn(*given))
    with pytest.raises(InvalidInput, match="the encoder diverged: its loss is nan in epoch 1, step 10"):
        train(spec(tmp_path))
    assert not (tmp_path / "work" / "bundle").exists()


@pytest.mark.slow
def test_under_dagster_figures_are_seen_before_it_ends_and_failures_say_why(tmp_path: Path) -> None:
    from assets import trainer

    plans = {"good": spec(tmp_path), "bad": spec(tmp_path, policies=("spam", "hate"))}
    results = []

    @asset
    def good(context, pipes: PipesSubprocessClient) -> MaterializeResult:  # type: ignore[no-untyped-def]
        result = trainer.train(context, pipes, plans["good"])
        results.append(result)
        return MaterializeResult(metadata=trainer.metadata_of(result))

    @asset
    def bad(context, pipes: PipesSubprocessClient) -> None:  # type: ignore[no-untyped-def]
        trainer.train(context, pipes, plans["bad"])

    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        done = materialize(
            [good, bad], instance=instance, resources={"pipes": PipesSubprocessClient()}, raise_on_error=False
        )
        assert results[0]["model_id"] == bundle.verify(toy_bundle()).model_id
        seen = instance.fetch_observations(AssetRecordsFilter(AssetKey("good")), limit=20).records[::-1]
        metadata = [record.asset_observation.metadata for record in seen]  # type: ignore[union-attr]
        assert [m["stage"].value for m in metadata] == [f"epoch {i} of 3" for i in (1, 2, 3)]
        assert [m["loss"].value for m in metadata] == [point["loss"] for point in results[0]["curve"]]
        end = instance.fetch_materializations(AssetKey("good"), limit=1).records[0]
        assert seen[-1].storage_id < end.storage_id
        shown = end.asset_materialization.metadata  # type: ignore[union-attr]
        assert shown["stopped"].value == "the schedule was carried out"
        assert "image/png" in str(shown["learning_curve"].value)
        why = next(e for e in done.all_events if e.is_step_failure).step_failure_data.user_failure_data
        assert why is not None
        assert "p_hate" in str(why.description)


@pytest.mark.slow
def test_any_hugging_face_encoder_can_be_trained(tmp_path: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw.train_from_iterator(
        [m.text for m in messages(300, 1)], trainers.WordPieceTrainer(special_tokens=special)
    )
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    source = tmp_path / "tiny-encoder"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(source)
    shape = transformers.BertConfig(
        vocab_size=raw.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.BertModel(shape).save_pretrained(source)
    folder = train(spec(tmp_path, encoder=str(source), epochs=2))
    assert str(tmp_path) not in (folder / bundle.NETWORK).read_text()
    assert Detector.load(folder).score(["claim free gift"], [[2.0, -1.0]]).shape == (1, len(POLICIES))
    assert Detector.load(folder).feature_names == FEATURES


def test_the_graphics_card_ends_with_the_same_model_twice(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no graphics card here")
    ids = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        ids.add(bundle.verify(train(spec(tmp_path / name))).model_id)
    assert len(ids) == 1


# -- warm start and forgetting -------------------------------------------------------------------------------


@given(
    sent_at=arrays.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 20)),
    seed=st.integers(0, 99),
    until=st.integers(-1, 21),
)
def test_whoever_is_judged_after_a_warm_start_was_never_learnt_from(
    sent_at: np.ndarray, seed: int, until: int
) -> None:
    group = np.random.default_rng(seed).integers(0, 12, len(sent_at))
    judged = np.flatnonzero(unheard_of(sent_at, group, until))
    learnt = np.flatnonzero(sent_at <= until)
    assert not set(judged) & set(learnt)
    assert not set(group[judged]) & set(group[learnt])
    left_out = set(range(len(sent_at))) - set(judged) - set(learnt)
    assert {group[i] for i in left_out} <= set(group[learnt])


def heir(folder: Path, **changes: object) -> TrainingSpec:
    """The spec of a successor of the toy bundle: it knows a hundred messages that are newer."""
    folder.mkdir(exist_ok=True)
    champion = toy_bundle()
    parent = {"parent_bundle": str(champion), "parent": bundle.verify(champion).model_id}
    plan = spec(folder, epochs=2, **parent, **changes)
    dataset(Path(plan.dataset), n=1000)
    return plan


@pytest.mark.slow
def test_a_warm_start_is_judged_on_what_the_champion_cannot_know_and_is_repeatable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import warm
    from models.dataset import load, split
    from models.encoding import Encoding

    monkeypatch.setattr(warm, "LEAST_ABUSIVE", 10)
    monkeypatch.setattr(warm, "LEAST_BENIGN", 40)
    plan = heir(tmp_path / "a", warm_start=True)
    folder = train(plan)
    told, result = result_of(folder)["metrics"], result_of(folder)
    assert told["training"]["warm"]
    assert bundle.verify(toy_bundle()).model_id in told["training"]["start"]
    data = load(plan)
    parts = split(data, plan.seed)
    assert told["n"]["judged"] < len(parts.judged)
    assert result["curve"][0]["loss"] < result_of(toy_bundle())["curve"][0]["loss"]
    old = told["old_campaigns"]
    assert old["n"] > 5
    assert old["recall"] > 0.6
    assert old["champion_recall"] > 0.6

    begin, moved = warm.start(plan, warm.Champion.of(plan), data, parts)
    again = Encoding(
        replace(plan, out=str(tmp_path)), data, moved, list, lambda event: None, inherited=begin.weights
    )
    again.rehearse([])
    again.refresh()
    weights = safetensors.torch.load((folder / bundle.ENCODER).read_bytes())
    for name, tensor in again.trainer.model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), weights[name].numpy())


def test_without_enough_unknown_messages_the_start_is_cold_and_says_why(tmp_path: Path) -> None:
    from models import warm
    from models.dataset import load, split

    plan = heir(tmp_path / "a", warm_start=True)
    data = load(plan)
    parts = split(data, plan.seed)
    of = warm.Champion.of(plan)
    assert of is not None
    begin, kept = warm.start(plan, of, data, parts)
    assert not begin.warm
    assert "newer than the champion's training" in begin.why
    assert kept is parts
    assert "held out" in warm.start(plan, replace(of, seed=8), data, parts)[0].why
    more = replace(parts, rates=(parts.rates[0], 2 * parts.rates[1]))
    assert "held out" in warm.start(plan, of, data, more)[0].why
    assert "held out" in warm.start(plan, replace(of, rates=()), data, parts)[0].why
    acted = np.ones(len(parts.held), bool)
    assert warm.old_campaigns(plan, of, data, parts, acted)["champion_recall"] is not None
    assert warm.old_campaigns(plan, of, data, more, acted)["champion_recall"] is None
    assert "no champion" in warm.start(plan, None, data, parts)[0].why


def test_weights_are_taken_over_only_where_the_shape_is_the_same(tmp_path: Path) -> None:
    from models import warm

    plan = heir(tmp_path / "a")
    of = warm.Champion.of(plan)
    assert of is not None
    weights, total = warm.inherited(plan, of)
    assert len(weights) == total
    fewer, _ = warm.inherited(replace(plan, policies=("spam",)), of)
    assert set(weights) - set(fewer) == {"head.linear.weight", "head.linear.bias"}
    assert warm.inherited(replace(plan, width=64), of)[0] == {}

"""The encoder in int8: judged on answers and on speed, kept only if it passes, never what attacks aim at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from models import bundle, quantize
from models.detector import Detector, Network, Shortcuts
from models.fusion import Fusion, Slice
from models.tokens import load_reader, views
from redqueen.errors import BundleError
from tests.toy_model import POLICIES, matrix, messages, toy_bundle

ROWS = messages(300, seed=41)
TEXTS = [m.text for m in ROWS]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return bundle.read(toy_bundle())[1]


@pytest.fixture(scope="module")
def small(files: dict[str, bytes]) -> bytes:
    return quantize.quantised(files[bundle.ONNX])


@pytest.fixture(scope="module")
def case(files: dict[str, bytes]) -> dict[str, Any]:
    """What `attempt` is asked about, as the training asks."""
    parts = Detector.load(toy_bundle()).parts
    seen = views(TEXTS)
    canonical = [view.canonical for view in seen]
    targets = np.array([[float(m.policy == p) for p in POLICIES] for m in ROWS], np.float32)
    return {
        "onnx": files[bundle.ONNX],
        "reader": files[bundle.READER],
        "views": seen,
        "logits": {
            "encoder": parts["encoder"].logits(seen),
            "linear": parts["linear"].logits(canonical),
            "markov": parts["markov"].logits(canonical),
            "trees": parts["trees"].logits(matrix(ROWS)),
        },
        "fusion": Fusion.from_dict(json.loads(files[bundle.FUSION])),
        "part": Slice(targets, np.ones(len(ROWS))),
    }


def test_weights_of_matrix_products_are_in_int8_with_a_scale_for_each_channel(
    small: bytes, files: dict[str, bytes]
) -> None:
    graph = onnx.load_from_string(small).graph
    weights = [w for w in graph.initializer if w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 2]
    assert weights
    scales = {s.name: s for s in graph.initializer if s.name.endswith("_scale")}
    per_channel = [list(s.dims) for s in scales.values() if list(s.dims) not in ([], [1])]
    assert len(per_channel) >= len(weights) / 2
    before = Network(files[bundle.ONNX], load_reader(files[bundle.READER])).logits(views(TEXTS))
    after = Network(small, load_reader(files[bundle.READER])).logits(views(TEXTS))
    assert 0 < np.abs(before - after).max() < 1.0


def test_the_same_answers_break_nothing(case: dict[str, Any]) -> None:
    figures = quantize.compare(case["logits"], case["logits"], case["fusion"], case["part"])
    assert figures["difference"] == figures["changed"] == 0
    assert figures["recall"] == figures["recall_float"]
    assert quantize._broken(figures) == ""


def test_answers_that_move_are_refused_with_the_figure(case: dict[str, Any]) -> None:
    moved = {**case["logits"], "encoder": case["logits"]["encoder"] - 6.0}
    figures = quantize.compare(case["logits"], moved, case["fusion"], case["part"])
    assert figures["recall"] < figures["recall_float"]
    assert str(figures["difference"]) in quantize._broken(figures)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"changed": 0.01}, "1.00% of decisions change"),
        ({"recall": 0.9}, "recall falls from 0.95 to 0.9"),
        ({"fpr": 0.02}, "false positives rise from 0.01 to 0.02"),
    ],
)
def test_each_figure_can_break_the_gate(changes: dict[str, float], told: str) -> None:
    fine = {"difference": 0.01, "changed": 0.0}
    fine |= {"recall_float": 0.95, "recall": 0.95, "fpr_float": 0.01, "fpr": 0.01}
    assert quantize._broken(fine) == ""
    assert told in quantize._broken(fine | changes)


def test_it_is_kept_only_where_it_is_faster(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "MOST_DIFFERENCE", 1.0)
    monkeypatch.setattr(quantize, "MOST_CHANGED", 1.0)
    monkeypatch.setattr(quantize, "LEAST_SPEEDUP", 1e6)
    network, verdict = quantize.attempt(**case)
    assert network is None
    assert not verdict["passed"]
    assert "times as fast" in verdict["why"]
    monkeypatch.setattr(quantize, "LEAST_SPEEDUP", 0.0)
    network, verdict = quantize.attempt(**case)
    assert network == quantize.quantised(case["onnx"])
    assert verdict["passed"]
    assert verdict["n"] == len(ROWS)


def test_a_network_that_cannot_be_quantised_is_a_verdict_and_no_error(case: dict[str, Any]) -> None:
    network, verdict = quantize.attempt(**{**case, "onnx": b"no network"})
    assert network is None
    assert "cannot be made" in verdict["why"]


def test_the_verdict_is_in_figures_and_card() -> None:
    verdict = json.loads((toy_bundle() / bundle.METRICS).read_text())["shortcuts"]["int8"]
    assert verdict["passed"] == (toy_bundle() / bundle.ONNX_INT8).exists()
    assert verdict["why"] in (toy_bundle() / bundle.CARD).read_text()


@pytest.fixture
def with_int8(tmp_path: Path, small: bytes) -> Path:
    """The toy bundle, with its encoder in int8 beside the float one."""
    folder = Path(shutil.copytree(toy_bundle(), tmp_path / "int8"))
    (folder / bundle.ONNX_INT8).write_bytes(small)
    return sealed_again(folder)


def sealed_again(folder: Path) -> Path:
    """With a manifest of the files that are there now."""
    sealed = bundle.verify(toy_bundle())
    (folder / bundle.MANIFEST).unlink()
    bundle.write_manifest(
        folder, policies=sealed.policies, features_version=sealed.features_version,
        feature_names=sealed.feature_names, selected=sealed.selected, snapshot=sealed.snapshot,
        code_version=sealed.code_version, parent=sealed.parent, created_at=sealed.created_at,
    )  # fmt: skip
    return folder


def test_serving_takes_int8_and_evaluation_the_float_network(with_int8: Path, small: bytes) -> None:
    exact, served = Detector.load(with_int8), Detector.load(with_int8, shortcuts=Shortcuts())
    float_ = Detector.load(toy_bundle())
    features = matrix(ROWS)
    np.testing.assert_array_equal(exact.score(TEXTS, features), float_.score(TEXTS, features))
    assert (served.score(TEXTS, features) != float_.score(TEXTS, features)).any()
    seen = views(TEXTS)
    reader = load_reader((with_int8 / bundle.READER).read_bytes())
    np.testing.assert_array_equal(served.parts["encoder"].logits(seen), Network(small, reader).logits(seen))


def test_int8_is_part_of_what_a_model_is_and_is_verified(with_int8: Path, tmp_path: Path) -> None:
    without = Path(shutil.copytree(with_int8, tmp_path / "float"))
    (without / bundle.ONNX_INT8).unlink()
    assert bundle.verify(with_int8).model_id != bundle.verify(sealed_again(without)).model_id
    with (with_int8 / bundle.ONNX_INT8).open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"encoder\.int8\.onnx"):
        Detector.load(with_int8)

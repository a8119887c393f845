"""The encoder in int8: made from the exported network, judged on held-out messages, and kept only if it
passes.

A small network can well be slower in int8 than in float: each layer first has to find the range of what comes
in. So nothing is taken for granted: answers and speed are measured on this very network, and whatever the
verdict is, it goes into the bundle's figures. Only training imports this module; which of the two networks is
served is `models.detector`'s business. As the target of attacks int8 hides weakness (its rounding blurs what
a search climbs on), so attacks and evaluation read the float network.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.detector import Network
from models.fusion import Floats, Fusion, Logits, Slice, share
from models.tokens import View, load_reader

MOST_DIFFERENCE = 0.05
"""Most that any held message's probability may move."""
MOST_CHANGED = 0.002
"""Most of the held messages that may be acted on by one network and not by the other."""
MOST_RECALL_LOST, MOST_FPR_GAINED = 0.003, 0.001
LEAST_SPEEDUP = 1.2
"""What it must gain in CPU time, in each of several rounds. Speed is the one thing here that another run may
measure differently, and the model's identity hangs on the verdict."""

MOST_JUDGED = 1_000
"""Held messages that it is judged on, evenly over time."""
_TIMED, _ROUNDS = 128, 7


def attempt(
    onnx: bytes, reader: bytes, views: Sequence[View], logits: Logits, fusion: Fusion, part: Slice
) -> tuple[bytes | None, dict[str, Any]]:
    """The network in int8 if it passes, else None; and the figures, `why` among them.

    Args:
        onnx: the network as exported, in float.
        reader: the encoder's reader, as in the bundle.
        views: n held messages that neither network was fitted to.
        logits: their log odds [n, policies] by part, those of the encoder in float.
        fusion: what makes probabilities and decisions of them.
        part: their labels.
    """
    if "encoder" not in fusion.full.parts:
        return None, _verdict("the encoder is not served")
    if not len(views):
        return None, _verdict("there are no held messages to judge it on")
    rows = np.unique(np.linspace(0, len(views) - 1, MOST_JUDGED).astype(np.int64))
    views, part = [views[i] for i in rows.tolist()], part.of(rows)
    logits = {name: z[rows] for name, z in logits.items()}
    try:
        small = quantised(onnx)
        network = Network(small, load_reader(reader))
        after = {**logits, "encoder": network.logits(views)}
    except Exception as error:
        # Whatever a strange network does to the quantiser, the float one is as good as it was.
        return None, _verdict(f"it cannot be made of this network ({type(error).__name__})")
    figures = compare(logits, after, fusion, part)
    if broken := _broken(figures):
        return None, _verdict(broken, **figures)
    figures["speedup"] = speedup(Network(onnx, load_reader(reader)), network, views)
    if figures["speedup"] < LEAST_SPEEDUP:
        slow = f"it is only {figures['speedup']} times as fast, {LEAST_SPEEDUP} is asked for"
        return None, _verdict(slow, **figures)
    return small, _verdict(f"{figures['speedup']} times as fast", passed=True, **figures)


def quantised(onnx: bytes) -> bytes:
    """Weights of the matrix products in int8, a scale for each output channel; what comes in is quantised as
    it comes (ONNX Runtime's dynamic quantisation). Convolutions stay in float: their integer kernels are
    slower.
    """
    import onnx as format
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = format.load_from_string(onnx).graph
    # Its integer product knows a scale a channel for plain matrices only.
    stacked = {weight.name for weight in graph.initializer if len(weight.dims) != 2}
    apart = [node.name for node in graph.node if node.op_type == "MatMul" and stacked & set(node.input)]

    quiet = logging.getLogger()
    level = quiet.level
    with tempfile.TemporaryDirectory(prefix="redqueen-int8-") as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(onnx)
        try:
            quiet.setLevel(logging.ERROR)  # it advises a preparation that changes nothing here
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=["MatMul", "Gemm"],
                nodes_to_exclude=apart,
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
        finally:
            quiet.setLevel(level)
        return target.read_bytes()


def compare(before: Logits, after: Logits, fusion: Fusion, part: Slice) -> dict[str, Any]:
    """What changes for held messages: probabilities, decisions, recall and false positives at the
    thresholds.
    """
    thresholds = np.asarray(fusion.thresholds, np.float32)
    p, q = fusion.probabilities(before), fusion.probabilities(after)
    acted, acts = _acted(p, thresholds), _acted(q, thresholds)
    abusive, weight = part.abusive, part.weight
    recall = [share(a, abusive, weight) for a in (acted, acts)]
    fpr = [share(a, ~abusive, weight) for a in (acted, acts)]
    return {
        "difference": round(float(np.abs(p - q).max()), 5),
        "changed": round(float((acted != acts).mean()), 5),
        "recall_float": recall[0],
        "recall": recall[1],
        "fpr_float": fpr[0],
        "fpr": fpr[1],
        "n": len(p),
    }


def _acted(p: Floats, thresholds: Floats) -> npt.NDArray[np.bool_]:
    return np.asarray((p >= thresholds).any(1))


def _broken(figures: dict[str, Any]) -> str:
    """Why the answers are not good enough; empty where they are."""
    if figures["difference"] > MOST_DIFFERENCE:
        return f"a probability moves by {figures['difference']}, at most {MOST_DIFFERENCE} is allowed"
    if figures["changed"] > MOST_CHANGED:
        return f"{figures['changed']:.2%} of decisions change, at most {MOST_CHANGED:.2%} may"
    if (figures["recall_float"] or 0) - (figures["recall"] or 0) > MOST_RECALL_LOST:
        return f"recall falls from {figures['recall_float']} to {figures['recall']}"
    if (figures["fpr"] or 0) - (figures["fpr_float"] or 0) > MOST_FPR_GAINED:
        return f"false positives rise from {figures['fpr_float']} to {figures['fpr']}"
    return ""


def speedup(float_: Network, small: Network, views: Sequence[View]) -> float:
    """How many times as fast the second is: CPU time of the same messages in turn, in the round in which it
    did worst. By each one's best round a busy neighbour now and then made another verdict, and with it
    another model.
    """
    some, rounds = views[:_TIMED], []
    for _ in range(_ROUNDS):
        spent = []
        for network in (float_, small):
            began = time.thread_time()
            network.logits(some)
            spent.append(time.thread_time() - began)
        rounds.append(spent[0] / spent[1])
    return round(float(min(rounds)), 2)


def _verdict(why: str, passed: bool = False, **figures: Any) -> dict[str, Any]:
    return {"passed": passed, "why": why, **figures}

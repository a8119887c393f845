"""What serving may use to answer sooner (the encoder in int8, a first stage), each made and put to its gate
on the held messages at the end of a training. What passes joins the bundle; every verdict joins its figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models import bundle, cascade, quantize
from models.dataset import Dataset, Split
from models.detector import Network
from models.fusion import Logits, Slice, Voice
from models.tokens import load_reader


def made(
    files: Mapping[str, bytes],
    parts: cascade.Parts,
    without_encoder: Voice,
    data: Dataset,
    split: Split,
    names: tuple[str, ...],
    held_logits: Logits,
    seed: int,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files to add to a bundle, and the verdicts: `int8` and `cascade`.

    Args:
        files: the encoder's files, as in the bundle; empty without an encoder.
        parts: the other parts, and what fuses all of them.
        without_encoder: how much the other parts count against each other, weighed on other messages than
            the held ones.
        names: the columns of the features.
        held_logits: log odds of the held messages by part.
    """
    if bundle.ONNX not in files or "encoder" not in parts.fusion.full.parts:
        none = {"passed": False, "why": "no encoder is served, so there is nothing to spare"}
        return {}, {"int8": none, "cascade": none}
    held = split.held
    seen = [data.views[i] for i in held]
    passages = parts.markov.passages
    part = Slice(data.targets[held], split.held_weight, data.group[held])
    small, int8 = quantize.attempt(
        files[bundle.ONNX], files[bundle.READER], passages(seen), held_logits, parts.fusion, part
    )
    network = Network(files[bundle.ONNX], load_reader(files[bundle.READER]))
    first, settles = cascade.fit(
        parts,
        without_encoder,
        cascade.Held(
            texts=[data.texts[i] for i in held],
            views=seen,
            features=None if data.features is None else data.features[held],
            names=names,
            part=part,
            logits=held_logits,
            encode=lambda other: network.logits(passages(other)),
        ),
        seed,
    )
    found = {} if small is None else {bundle.ONNX_INT8: small}
    if first is not None:
        found[bundle.CASCADE] = first.to_bytes()
    return found, {"int8": int8, "cascade": settles}

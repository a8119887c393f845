"""The text encoder, top to bottom: hyper-parameters, reader, network, one epoch of training, export.

Only the training process imports this module (it loads torch and transformers). The default is a compact
character-robust transformer trained here from nothing, in the manner of RETVec (Bursztein et al., NeurIPS
2023): characters are the bits of their code points, so that there is no vocabulary to go stale and no unknown
text; a small convolution makes a vector of each word, which a misspelling moves a little; vectors of the
word's n-grams, found by their hash, are added to it (fastText: Bojanowski et al., TACL 5, 2017); a few
transformer layers read the words. `source` takes any Hugging Face encoder instead.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn

from models.perturb import disturbed
from models.rows import RowAdam
from models.tokens import (
    GRAM_BITS,
    KINDS,
    LEVELS,
    WORD,
    Feeds,
    Pieces,
    Reader,
    View,
    Words,
    length_buckets,
    log_odds,
)


@dataclass(frozen=True)
class EncoderConfig:
    """Every hyper-parameter of the encoder and its training."""

    source: str | None = None
    """A Hugging Face encoder by name or local path; None trains the compact one from scratch."""
    layers: int = 2
    width: int = 96
    heads: int = 4
    max_tokens: int = 48
    """Places of a part of a message: words of the compact encoder, pieces of a pretrained one."""
    batch: int = 64
    learning_rate: float | None = None
    """Peak rate; None is 2e-3 from scratch and 5e-5 for a pretrained encoder."""
    weight_decay: float = 0.01
    noise: float = 0.2
    """Share of training messages that are disturbed afresh each epoch (see `models.perturb`)."""
    padding: float = 0.1
    """Share of training messages that get parts of a benign message before or after them."""

    @property
    def peak_rate(self) -> float:
        """The learning rate after warming up."""
        return self.learning_rate or (5e-5 if self.source else 2e-3)


def make_reader(config: EncoderConfig) -> Reader:
    """What feeds the network: words of characters, or the pretrained encoder's own tokenizer."""
    if config.source is None:
        return Words(config.max_tokens)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.source, **_local(config.source))
    raw = tokenizer.backend_tokenizer
    raw.no_padding()
    raw.no_truncation()
    return Pieces(raw, config.max_tokens, tokenizer.pad_token_id or 0)


def _local(source: str) -> dict[str, bool]:
    return {"local_files_only": True} if os.path.isdir(source) else {}


# -- network -------------------------------------------------------------------------------------------------


class WordVectors(nn.Module):
    """The code points of words [u, up to WORD, 3 bytes] and their n-grams to vectors [u, width]. What fills
    a word up changes nothing.

    A byte is eight bits times a matrix, which is looking up one of 256 rows; two convolutions over the
    characters see which stand near which (up to three away to either side), the maximum over the word what it
    contains anywhere. That tells forms of writing apart, but what a rare stem means takes more examples than
    there are: each bucket of n-grams has a vector that learns from its first message on, and those of a word
    are added up, over the root of their number.
    """

    bits: Tensor

    def __init__(self, width: int, channels: int = 32) -> None:
        super().__init__()
        self.register_buffer("bits", ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float(), False)
        self.from_bits = nn.Parameter(torch.randn(3, 8, channels) * 0.3)
        self.place = nn.Parameter(torch.randn(WORD, channels) * 0.1)
        self.one = nn.Linear(channels, channels)
        self.near = nn.Conv1d(channels, channels, 5, padding=2)
        self.far = nn.Conv1d(channels, 2 * channels, 3, padding=1)
        self.out = nn.Linear(2 * channels, width)
        self.grams = nn.Embedding(1 + 2**GRAM_BITS, width, padding_idx=0)
        with torch.no_grad():
            self.grams.weight.mul_(0.1)

    def forward(self, short: Tensor, long: Tensor, short_grams: Tensor, long_grams: Tensor) -> Tensor:
        """Vectors of short words, then of long ones; that of the empty word means nothing."""
        written = self.out(torch.cat([self._contained(short), self._contained(long)]))
        return written + torch.cat([self._added_up(short_grams), self._added_up(long_grams)])

    def _contained(self, words: Tensor) -> Tensor:
        codes = words.long()
        characters = self.place[: words.shape[1]] + sum(
            nn.functional.embedding(codes[..., i], rows) for i, rows in enumerate(self.bits @ self.from_bits)
        )
        there = (codes.sum(-1, keepdim=True) > 0).to(characters.dtype)
        seen = (self.one(torch.relu(characters)) * there).transpose(1, 2)
        there = there.transpose(1, 2)
        seen = torch.relu(self.near(seen)) * there + seen
        return (torch.relu(self.far(seen)) * there).amax(2)

    def _added_up(self, grams: Tensor) -> Tensor:
        number = (grams > 0).sum(1, keepdim=True).clamp(min=1)
        return self.grams(grams).sum(1) / number.to(self.grams.weight.dtype).sqrt()


class _Head(nn.Module):
    """Mean and maximum over the places, one linear layer: log odds by policy.

    The maximum lets a single telling word speak through a long harmless message.
    """

    def __init__(self, width: int, policies: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, policies)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        kept = mask.unsqueeze(-1).to(states.dtype)
        mean = (states * kept).sum(1) / kept.sum(1)
        largest = (states - (1 - kept) * 1e4).amax(1)
        return self.linear(torch.cat([mean, largest], -1))


class CompactEncoder(nn.Module):
    """What `Words` feeds, to log odds [n, policies]."""

    def __init__(self, config: EncoderConfig, policies: int) -> None:
        super().__init__()
        self.vectors = WordVectors(config.width)
        # No dropout: drawing the random numbers costs as much as the layers; disturbed texts regularise
        # instead. Eager attention: the others trace badly to ONNX, and at 48 places they are no faster.
        shape = transformers.BertConfig(
            vocab_size=1,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=2 * config.width,
            max_position_embeddings=config.max_tokens,
            type_vocab_size=KINDS,
            hidden_act="relu",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.backbone = transformers.AutoModel.from_config(
            shape, add_pooling_layer=False, attn_implementation="eager"
        )
        self.backbone.embeddings.word_embeddings.requires_grad_(False)
        self.head = _Head(config.width, policies)

    def forward(
        self,
        short: Tensor,
        long: Tensor,
        short_grams: Tensor,
        long_grams: Tensor,
        places: Tensor,
        kinds: Tensor,
    ) -> Tensor:
        mask = (kinds > 0).long()
        # A word that comes up a hundred times in a batch is read once.
        vectors = nn.functional.embedding(places, self.vectors(short, long, short_grams, long_grams))
        vectors = vectors * (kinds > LEVELS).unsqueeze(-1).to(vectors.dtype)
        states = self.backbone(inputs_embeds=vectors, attention_mask=mask, token_type_ids=kinds)
        return self.head(states.last_hidden_state, mask)


class PretrainedEncoder(nn.Module):
    """What `Pieces` feeds, to log odds [n, policies], by any Hugging Face encoder."""

    def __init__(self, config: EncoderConfig, policies: int) -> None:
        super().__init__()
        assert config.source is not None
        self.backbone = transformers.AutoModel.from_pretrained(
            config.source, attn_implementation="eager", **_local(config.source)
        )
        self.head = _Head(self.backbone.config.hidden_size, policies)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


Encoder = CompactEncoder | PretrainedEncoder


def build(config: EncoderConfig, policies: int) -> Encoder:
    """The network, untrained but for a pretrained backbone."""
    kind = CompactEncoder if config.source is None else PretrainedEncoder
    return kind(config, policies)


def run(model: Encoder, feeds: Feeds) -> Tensor:
    """Log odds [n, policies] of one batch of a reader, computed where the network is."""
    device = model.head.linear.weight.device
    return model(**{name: torch.from_numpy(values).to(device) for name, values in feeds.items()})


# -- training ------------------------------------------------------------------------------------------------


CHARACTERS_A_PLACE = 12
"""More than a place of the reader takes up, so that a text cut to it still fills every place."""


@dataclass(frozen=True)
class Examples:
    """What an encoder learns from: views of messages, soft targets [n, policies], weights [n], and the texts
    as they were sent, where they are known.
    """

    views: Sequence[View]
    targets: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    texts: Sequence[str] = ()


class Trainer:
    """A network and its optimizer on a fixed schedule of epochs; on the graphics card where there is one.

    Each epoch draws its randomness from (seed, epoch) and each step from (seed, epoch, step) alone, so a run
    that resumes from any step's `state` ends with the model that an uninterrupted run ends with.
    """

    def __init__(
        self,
        config: EncoderConfig,
        reader: Reader,
        examples: Examples,
        rehearsal: Sequence[npt.NDArray[np.int64]],
        refresh: Sequence[npt.NDArray[np.int64]],
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.reader, self.examples = config, reader, examples
        self.epochs, self.rehearsals, self.seed = [*rehearsal, *refresh], len(rehearsal), seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build(config, examples.targets.shape[1]).to(self.device)
        tables = _wide_tables(self.model)
        self.tables = [table.weight for table in tables]
        for table in tables:
            table.sparse = True
        self.others = [p for p in self.model.parameters() if not any(p is table for table in self.tables)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self.others, config.peak_rate, weight_decay=config.weight_decay, fused=True)
        ]
        if tables:
            self.optimizers.append(RowAdam(self.tables, config.peak_rate))
        self.moved_by = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        self.steps_before = np.cumsum([0, *(-(-len(rows) // config.batch) for rows in self.epochs)])
        # Abuse is rare: weigh it up, but by the root, or the few mislabelled messages rule the gradient.
        learnt = np.unique(np.concatenate(self.epochs))
        weight = examples.weight[learnt]
        positive = (examples.targets[learnt] * weight[:, None]).sum(0) / max(weight.sum(), 1e-9)
        self.positive_weight = torch.tensor(
            np.clip(np.sqrt(1 / np.maximum(positive, 1e-4)), 1, 6), dtype=torch.float32, device=self.device
        )
        self.benign = np.flatnonzero(examples.targets.max(1) < 0.2)

    def steps(self, epoch: int, done: int = 0) -> Iterator[tuple[float, int]]:
        """Train an epoch from where `done` of its steps are done: the mean loss and the size of each batch.

        A step is learnt when it is asked for; `state` in between is that after the last one.
        """
        rng = np.random.default_rng([self.seed, epoch])
        rows, first = self.epochs[epoch], int(self.steps_before[epoch])
        parts = self.reader.parts(self._disturbed(rows, rng))
        # Of a long message another part each epoch.
        draws = rng.random(len(parts))
        sequences = [found[int(draw * len(found))] for found, draw in zip(parts, draws, strict=True)]
        self.model.train()
        for step, batch in enumerate(_shuffled_buckets(sequences, self.config.batch, rng)):
            if step < done:
                continue
            torch.manual_seed((self.seed * 1_000 + epoch) * 1_000_000 + step)
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = self._rate(first + step)
            yield self._step([sequences[i] for i in batch], rows[batch]), len(batch)

    def _disturbed(self, rows: npt.NDArray[np.int64], rng: np.random.Generator) -> list[View]:
        seen, config = self.examples, self.config
        most = CHARACTERS_A_PLACE * config.max_tokens
        # Of other messages than this epoch's nothing may be learnt yet, and of the held ones never.
        benign = np.intersect1d(self.benign, rows)
        return disturbed(seen.views, seen.texts, rows, benign, config.noise, config.padding, most, rng)

    def _rate(self, step: int) -> float:
        """Warm up over a twentieth of the steps, then fall along a cosine to a tenth; in the rehearsal, and
        once more in the refresh.
        """
        begin, end = 0, int(self.steps_before[self.rehearsals])
        if step >= end:
            begin, end = end, int(self.steps_before[-1])
        done = (step - begin) / max(1, end - begin)
        return (
            self.config.peak_rate
            * min(1.0, (done + 1e-3) / 0.05)
            * (0.55 + 0.45 * float(np.cos(np.pi * done)))
        )

    def _step(self, sequences: Sequence[Any], rows: npt.NDArray[np.int64]) -> float:
        feeds = self.reader.padded(sequences)
        target = torch.from_numpy(self.examples.targets[rows]).to(self.device)
        weight = torch.from_numpy(self.examples.weight[rows]).to(self.device).unsqueeze(1)
        # bfloat16 is a third faster on CPUs that have it, and as deterministic; elsewhere torch emulates it
        # slowly.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=_has_bfloat16(self.device)):
            logits = run(self.model, feeds)
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits.float(), target, weight=weight, pos_weight=self.positive_weight
        )
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._clip(1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss.detach())

    def _clip(self, most: float) -> None:
        """Scale all gradients down to a norm of `most`; `clip_grad_norm_` knows no sparse ones."""
        for table in self.tables:
            table.grad = None if table.grad is None else table.grad.coalesce()
        found = [p.grad for p in (*self.others, *self.tables) if p.grad is not None]
        gradients = [gradient.values() if gradient.is_sparse else gradient for gradient in found]
        norm = nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))

    def state(self) -> dict[str, Tensor]:
        """All that the next epoch depends on, as tensors."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.moved_by[parameter].state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go back to a `state`."""
        model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        self.model.load_state_dict(model)
        parameters = dict(self.model.named_parameters())
        for full, value in tensors.items():
            if full.startswith("optimizer."):
                _, key, name = full.split(".", 2)
                parameter = parameters[name]
                self.moved_by[parameter].state[parameter][key] = value.to(self.device, copy=True)


def _wide_tables(model: nn.Module) -> list[nn.Embedding]:
    """Tables of vectors, learnt from nothing, of which a batch reads a few."""
    return [model.vectors.grams] if isinstance(model, CompactEncoder) else []


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    probe: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def _shuffled_buckets(
    sequences: Sequence[Any], size: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Batches of similar length in random order; who shares a batch changes with each epoch."""
    lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
    jittered = (lengths * 4 + rng.integers(0, 12, len(lengths))).astype(np.int64)
    order = rng.permutation(len(lengths))
    batches = [order[b] for b in length_buckets(jittered[order], size)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


# -- use and export ------------------------------------------------------------------------------------------


def logits(
    model: Encoder, reader: Reader, views: Sequence[View], batch: int = 256
) -> npt.NDArray[np.float32]:
    """Log odds [n, policies], in the order of `views`."""
    model.eval()
    with torch.inference_mode():
        return log_odds(
            reader,
            views,
            lambda feeds: run(model, feeds).float().cpu().numpy(),
            model.head.linear.out_features,
            batch,
        )


def to_onnx(model: Encoder, reader: Reader) -> bytes:
    """The network as ONNX: the reader's inputs, all sizes free, to `logits` float32 [n, policies]."""
    import warnings

    some = reader.parts([View("free gift claim", 1, "fr33 gift"), View("hello", 0)])
    feeds = reader.padded([sequence for found in some for sequence in found])
    axes = {name: {i: f"{name}_{i}" for i in range(values.ndim)} for name, values in feeds.items()}
    axes |= {name: {0: name} for name in ("short", "long", "short_grams", "long_grams") if name in feeds}
    out = io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter is marked as old; it takes 0.4 s, the new one 10 s and another package.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            tuple(torch.from_numpy(values) for values in feeds.values()),
            out,  # type: ignore[arg-type]  # it takes a buffer too
            input_names=list(feeds),
            output_names=["logits"],
            dynamic_axes={**axes, "logits": {0: "n"}},
            opset_version=17,
            dynamo=False,
        )
    return out.getvalue()


def describe(config: EncoderConfig, model: Encoder) -> dict[str, Any]:
    """What is needed to build the network again; holds no path of this machine."""
    backbone = {
        k: v for k, v in model.backbone.config.to_dict().items() if k not in ("_name_or_path", "dtype")
    }
    shown = asdict(config) | {"source": Path(config.source).name if config.source else None}
    return {"config": shown, "backbone": backbone}

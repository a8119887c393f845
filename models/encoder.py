"""The text encoder, top to bottom: hyper-parameters, tokenizer, network, one epoch of training, export.

Only the training process imports this module (it loads torch and transformers). The default is a compact
transformer trained here from nothing; `source` takes any Hugging Face encoder instead.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from models.tokens import VIEW_TOKENS, Ids, Tokens, View, length_buckets


@dataclass(frozen=True)
class EncoderConfig:
    """Every hyper-parameter of the encoder and its training."""

    source: str | None = None
    """A Hugging Face encoder by name or local path; None trains the compact one from scratch."""
    layers: int = 2
    width: int = 96
    heads: int = 4
    vocabulary: int = 4096
    max_tokens: int = 48
    batch: int = 64
    learning_rate: float | None = None
    """Peak rate; None is 2e-3 from scratch and 5e-5 for a pretrained encoder."""
    weight_decay: float = 0.01
    noise: float = 0.2
    """Share of training messages whose characters are disturbed afresh each epoch."""
    padding: float = 0.1
    """Share of training messages that get a benign message put before or after them."""

    @property
    def peak_rate(self) -> float:
        """The learning rate after warming up."""
        return self.learning_rate or (5e-5 if self.source else 2e-3)


# -- tokenizer -----------------------------------------------------------------------------------------------


def make_tokens(config: EncoderConfig, canonical: Sequence[str]) -> Tokens:
    """The tokenizer: a small byte-level BPE learnt from `canonical`, or the pretrained encoder's own.

    Bytes are the floor, so no text is unknown; a small vocabulary keeps words in pieces that survive
    misspelling.
    """
    if config.source is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.source, **_local(config.source))
        raw = tokenizer.backend_tokenizer
        raw.no_padding()
        raw.no_truncation()
        return Tokens(raw, config.max_tokens, tokenizer.pad_token_id or 0, ())
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        min_frequency=3,
        special_tokens=["[PAD]", *VIEW_TOKENS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=10,
        show_progress=False,
    )
    raw.train_from_iterator(canonical, trainer)
    return load_tokens(raw, config)


def load_tokens(raw: tokenizers.Tokenizer, config: EncoderConfig) -> Tokens:
    """The compact encoder's `Tokens` around a tokenizer that `make_tokens` learnt."""
    return Tokens(raw, config.max_tokens, 0, tuple(int(raw.token_to_id(t) or 0) for t in VIEW_TOKENS))


def _local(source: str) -> dict[str, bool]:
    return {"local_files_only": True} if os.path.isdir(source) else {}


# -- network -------------------------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """Token ids to log odds by policy: a transformer, mean and maximum over the tokens, one linear layer.

    The maximum lets a single telling token speak through a long harmless message.
    """

    def __init__(self, config: EncoderConfig, vocabulary: int, policies: int) -> None:
        super().__init__()
        self.backbone = _backbone(config, vocabulary)
        self.head = nn.Linear(2 * self.backbone.config.hidden_size, policies)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Log odds [n, policies] of ids and mask [n, tokens]."""
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = mask.unsqueeze(-1).to(states.dtype)
        mean = (states * kept).sum(1) / kept.sum(1)
        largest = (states - (1 - kept) * 1e4).amax(1)
        return self.head(torch.cat([mean, largest], -1))


def _backbone(config: EncoderConfig, vocabulary: int) -> Any:
    # Eager attention: the other implementations trace badly to ONNX, and at 48 tokens they are no faster.
    if config.source is not None:
        return transformers.AutoModel.from_pretrained(
            config.source, attn_implementation="eager", **_local(config.source)
        )
    # No dropout: drawing the random numbers costs as much as the layers; disturbed texts regularise instead.
    shape = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=2 * config.width,
        max_position_embeddings=config.max_tokens,
        type_vocab_size=1,
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return transformers.AutoModel.from_config(shape, add_pooling_layer=False, attn_implementation="eager")


# -- training ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """What an encoder learns from: views of messages, soft targets [n, policies], weights [n]."""

    views: Sequence[View]
    targets: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]


class Trainer:
    """A network, its optimizer and its place in a fixed schedule of epochs.

    Each epoch draws its randomness from (seed, epoch) alone, so a run that resumes from an epoch's checkpoint
    ends with the model that an uninterrupted run ends with.
    """

    def __init__(
        self,
        config: EncoderConfig,
        tokens: Tokens,
        examples: Examples,
        epochs: Sequence[npt.NDArray[np.int64]],
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.tokens, self.examples, self.epochs, self.seed = (
            config,
            tokens,
            examples,
            epochs,
            seed,
        )
        self.model = TextEncoder(config, tokens.tokenizer.get_vocab_size(), examples.targets.shape[1])
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.peak_rate, weight_decay=config.weight_decay, fused=True
        )
        self.steps_before = np.cumsum([0, *(-(-len(rows) // config.batch) for rows in epochs)])
        # Abuse is rare: weigh it up, but by the root, or the few mislabelled messages rule the gradient.
        positive = (examples.targets * examples.weight[:, None]).sum(0) / max(examples.weight.sum(), 1e-9)
        self.positive_weight = torch.tensor(
            np.clip(np.sqrt(1 / np.maximum(positive, 1e-4)), 1, 6), dtype=torch.float32
        )
        self.benign = np.flatnonzero(examples.targets.max(1) < 0.2)

    def run_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch; returns its mean loss and its speed in examples a second."""
        torch.manual_seed(self.seed * 1_000 + epoch)
        rng = np.random.default_rng([self.seed, epoch])
        rows = self.epochs[epoch]
        began, total, step = time.perf_counter(), 0.0, int(self.steps_before[epoch])
        sequences = self.tokens.ids(disturbed(self.examples.views, rows, self.benign, self.config, rng))
        self.model.train()
        for batch in _shuffled_buckets(sequences, self.config.batch, rng):
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate(step)
            total += self._step([sequences[i] for i in batch], rows[batch]) * len(batch)
            step += 1
        seconds = time.perf_counter() - began
        return {"loss": total / len(rows), "examples_per_s": len(rows) / seconds}

    def _rate(self, step: int) -> float:
        """Warm up over a twentieth of all steps, then fall along a cosine to a tenth."""
        done = step / max(1, int(self.steps_before[-1]))
        return (
            self.config.peak_rate
            * min(1.0, (done + 1e-3) / 0.05)
            * (0.55 + 0.45 * float(np.cos(np.pi * done)))
        )

    def _step(self, sequences: Sequence[Ids], rows: npt.NDArray[np.int64]) -> float:
        ids, mask = self.tokens.padded(sequences)
        target = torch.from_numpy(self.examples.targets[rows])
        weight = torch.from_numpy(self.examples.weight[rows]).unsqueeze(1)
        # bfloat16 is a third faster on CPUs that have it, and as deterministic; elsewhere torch emulates it
        # slowly.
        with torch.autocast("cpu", torch.bfloat16, enabled=_has_bfloat16()):
            logits = self.model(torch.from_numpy(ids), torch.from_numpy(mask))
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits.float(), target, weight=weight, pos_weight=self.positive_weight
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def state(self) -> dict[str, Tensor]:
        """All that the next epoch depends on, as tensors."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return {k: v.detach().clone().contiguous() for k, v in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go back to a `state`."""
        model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        self.model.load_state_dict(model)
        parameters = dict(self.model.named_parameters())
        for full, value in tensors.items():
            if full.startswith("optimizer."):
                _, key, name = full.split(".", 2)
                self.optimizer.state[parameters[name]][key] = value.clone()


def _has_bfloat16() -> bool:
    probe: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def _shuffled_buckets(
    sequences: Sequence[Ids], size: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Batches of similar length in random order; who shares a batch changes with each epoch."""
    lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
    jittered = (lengths * 4 + rng.integers(0, 12, len(lengths))).astype(np.int64)
    order = rng.permutation(len(lengths))
    batches = [order[b] for b in length_buckets(jittered[order], size)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


_NEIGHBOURS = "abcdefghijklmnopqrstuvwxyz0123456789"


def disturbed(
    views: Sequence[View],
    rows: npt.NDArray[np.int64],
    benign: npt.NDArray[np.int64],
    config: EncoderConfig,
    rng: np.random.Generator,
) -> list[View]:
    """The views of `rows`, some with disturbed characters, a random view token, or a benign neighbour.

    Benign and abusive messages are treated alike: a misspelling or a long message must not itself look like
    abuse.
    """
    draws = rng.random((len(rows), 3))
    pick = random.Random(int(rng.integers(2**63)))
    out = []
    for (noise, pad, level), row in zip(draws, rows, strict=True):
        seen = views[row]
        words, mark = seen.canonical, seen.level
        if noise < config.noise:
            words = misspelt(words, pick, pick.uniform(0.03, 0.15))
        if pad < config.padding and len(benign):
            other = views[int(benign[pick.randrange(len(benign))])].canonical
            words = f"{other} {words}" if pick.random() < 0.5 else f"{words} {other}"
        out.append(View(words, pick.randrange(len(VIEW_TOKENS)) if level < 0.05 else mark))
    return out


def misspelt(words: str, pick: random.Random, share: float) -> str:
    """`words` with about `share` of its characters dropped, doubled, swapped, replaced or split off."""
    letters = list(words)
    for _ in range(max(1, int(len(letters) * share))):
        if len(letters) < 3:
            break
        at = pick.randrange(len(letters) - 1)
        match pick.randrange(5):
            case 0:
                del letters[at]
            case 1:
                letters.insert(at, letters[at])
            case 2:
                letters[at], letters[at + 1] = letters[at + 1], letters[at]
            case 3:
                letters[at] = pick.choice(_NEIGHBOURS)
            case _:
                letters.insert(at, pick.choice(" .-_"))
    return "".join(letters)


# -- use and export ------------------------------------------------------------------------------------------


def logits(
    model: TextEncoder, tokens: Tokens, views: Sequence[View], batch: int = 256
) -> npt.NDArray[np.float32]:
    """Log odds [n, policies], in the order of `views`."""
    sequences = tokens.ids(views)
    out = np.zeros((len(views), model.head.out_features), np.float32)
    lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
    model.eval()
    with torch.inference_mode():
        for rows in length_buckets(lengths, batch):
            ids, mask = tokens.padded([sequences[i] for i in rows])
            out[rows] = model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    return out


def to_onnx(model: TextEncoder) -> bytes:
    """The network as ONNX: `ids`, `mask` int64 [n, tokens] to `logits` float32 [n, policies], both sizes
    free.
    """
    import warnings

    ids, out = torch.ones((2, 7), dtype=torch.int64), io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter is marked as old; it takes 0.4 s, and the new one wants another package and 10
        # s.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (ids, torch.ones_like(ids)),
            out,  # type: ignore[arg-type]  # it takes a buffer too
            input_names=["ids", "mask"],
            output_names=["logits"],
            dynamic_axes={"ids": {0: "n", 1: "tokens"}, "mask": {0: "n", 1: "tokens"}},
            opset_version=17,
            dynamo=False,
        )
    return out.getvalue()


def describe(config: EncoderConfig, model: TextEncoder, tokens: Tokens) -> dict[str, Any]:
    """What is needed to build the network again and to feed it; holds no path of this machine."""
    backbone = {
        k: v for k, v in model.backbone.config.to_dict().items() if k not in ("_name_or_path", "dtype")
    }
    shown = asdict(config) | {"source": Path(config.source).name if config.source else None}
    return {
        "config": shown,
        "backbone": backbone,
        "max_tokens": tokens.max_tokens,
        "pad_id": tokens.pad_id,
        "view_ids": list(tokens.view_ids),
    }

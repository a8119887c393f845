"""The optimizer of tables whose rows are seldom read."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.encoder import EncoderConfig, Examples, Trainer, make_reader
from models.rows import RowAdam
from models.tokens import views

ROWS, WIDTH = 7, 3
STEPS = st.lists(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=6), min_size=1, max_size=8)


def learnt(optimizer: str, steps: list[list[int]]) -> np.ndarray:
    """A table after steps that each read some rows, some of them twice."""
    torch.manual_seed(3)
    table = torch.nn.Embedding(ROWS, WIDTH, sparse=True)
    made = {
        "ours": lambda: RowAdam([table.weight], 0.1),
        "torch": lambda: torch.optim.SparseAdam([table.weight], 0.1, betas=(0.0, 0.999)),
    }[optimizer]()
    for number, rows in enumerate(steps):
        made.zero_grad()
        wanted = torch.linspace(-1, 1 + number, WIDTH)
        ((table(torch.tensor(rows)) - wanted) ** 2).sum().backward()
        made.step()
    return table.weight.detach().numpy()


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_it_answers_as_the_sparse_adam_of_torch_without_momentum(steps: list[list[int]]) -> None:
    np.testing.assert_allclose(learnt("ours", steps), learnt("torch", steps), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_a_row_that_no_step_reads_stays_as_it_was(steps: list[list[int]]) -> None:
    torch.manual_seed(3)
    before = torch.nn.Embedding(ROWS, WIDTH, sparse=True).weight.detach().numpy()
    read = {row for rows in steps for row in rows}
    moved = (learnt("ours", steps) != before).any(1)
    assert moved.tolist() == [row in read for row in range(ROWS)]


def test_without_a_gradient_nothing_moves_and_nothing_is_counted() -> None:
    table = torch.nn.Embedding(ROWS, WIDTH, sparse=True)
    before = table.weight.detach().clone()
    optimizer = RowAdam([table.weight], 0.1)
    optimizer.step()
    assert torch.equal(table.weight, before)
    assert int(optimizer.state[table.weight]["step"]) == 0


def trainer(texts: list[str]) -> Trainer:
    config = EncoderConfig(noise=0.0, padding=0.0)
    ones = np.ones(len(texts), np.float32)
    examples = Examples(views(texts), ones[:, None], ones)
    return Trainer(config, make_reader(config), examples, [np.arange(len(texts))], [], seed=1)


def test_the_encoder_moves_just_the_n_grams_that_its_messages_hold() -> None:
    learning = trainer(["claim your gift", "free gift"])
    [table] = learning.tables
    before = table.detach().clone()
    list(learning.steps(0))
    feeds = learning.reader.padded(
        [part for found in learning.reader.parts(learning.examples.views) for part in found]
    )
    held = np.unique(np.concatenate([feeds["short_grams"].ravel(), feeds["long_grams"].ravel()]))
    moved = np.flatnonzero((table.detach() != before).any(1).numpy())
    assert moved.tolist() == held[held > 0].tolist()


def test_gradients_are_scaled_down_together_as_torch_does_it() -> None:
    learning = trainer(["claim your gift", "free gift"])
    rng = torch.Generator().manual_seed(0)
    for parameter in learning.others:
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    [table] = learning.tables
    rows = torch.tensor([[5, 9, 5]])
    table.grad = torch.sparse_coo_tensor(
        rows, torch.randn(3, table.shape[1], generator=rng), table.shape, check_invariants=True
    )
    dense = [torch.nn.Parameter(p.detach().clone()) for p in (*learning.others, table)]
    for copy, parameter in zip(dense, (*learning.others, table), strict=True):
        assert parameter.grad is not None
        copy.grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad.clone()
    torch.nn.utils.clip_grad_norm_(dense, 1.0)
    learning._clip(1.0)
    for copy, parameter in zip(dense, (*learning.others, table), strict=True):
        assert copy.grad is not None
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.to_dense(), copy.grad)

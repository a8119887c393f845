"""The optimizer of tables whose rows are seldom read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from models.rows import RowAdam  # noqa: E402

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

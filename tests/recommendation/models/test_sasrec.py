"""SASRec against transformers' T5 decoder, and the softmax over the whole catalogue by hand."""

import pytest
import torch
import torch.nn.functional as F

from ..conftest import NUM_ITEMS, randomize, windows_of
from ..t5_stack import causal_stack

ROWS = [[3, 8, 0, 29, 11], [5, 21]]


@pytest.fixture
def model(make_model):
    model = make_model("sasrec", num_heads=2).eval()
    randomize(model)
    return model


@pytest.fixture
def logits(model):
    """The oracle's logits at each row's positions: (row length, N)."""
    with torch.no_grad():
        found = []
        for row in ROWS:
            x = model.items(torch.tensor([row])) + model.positions.weight[: len(row)]
            found.append(causal_stack(model.layers, model.norm, None, x)[0] @ model.items.weight.T)
        return found


def test_the_loss_is_the_cross_entropy_over_all_items(model, logits):
    losses = [F.cross_entropy(of_row[:-1], torch.tensor(row[1:]), reduction="none")
              for of_row, row in zip(logits, ROWS, strict=True)]
    loss = model.compute_loss(windows_of(*ROWS))["loss_total"]
    assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)


def test_items_are_ranked_by_the_last_positions_scores(model, logits):
    result = model.recommend(windows_of(*ROWS), NUM_ITEMS)
    for row, of_row in enumerate(logits):
        expected = of_row[-1].sort(descending=True)
        assert result.items[row].tolist() == expected.indices.tolist()
        assert torch.allclose(result.scores[row], expected.values, atol=1e-4)

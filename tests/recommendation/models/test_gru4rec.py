"""GRU4Rec against the equations of the GRU, and the softmax over the whole catalogue by hand."""

import pytest
import torch
import torch.nn.functional as F

from ..conftest import NUM_ITEMS, windows_of

ROWS = [[3, 8, 0, 29, 11], [5, 21]]


@pytest.fixture
def model(make_model):
    return make_model("gru4rec", num_layers=1).eval()


@pytest.fixture
def logits(model):
    """The logits after each item of each row, by the equations of Cho et al. 2014: (row length, N)."""
    with torch.no_grad():
        found = []
        for row in ROWS:
            hidden, outputs = torch.zeros(16), []
            for x in model.items.weight[row]:
                from_input = (model.gru.weight_ih_l0 @ x + model.gru.bias_ih_l0).chunk(3)
                from_hidden = (model.gru.weight_hh_l0 @ hidden + model.gru.bias_hh_l0).chunk(3)
                reset, update = (torch.sigmoid(a + b) for a, b in zip(from_input[:2], from_hidden[:2], strict=True))
                new = torch.tanh(from_input[2] + reset * from_hidden[2])
                hidden = (1 - update) * new + update * hidden
                outputs.append(hidden)
            found.append(torch.stack(outputs) @ model.items.weight.T)
        return found


def test_the_loss_is_the_cross_entropy_over_all_items(model, logits):
    losses = [F.cross_entropy(of_row[:-1], torch.tensor(row[1:]), reduction="none")
              for of_row, row in zip(logits, ROWS, strict=True)]
    loss = model.compute_loss(windows_of(*ROWS))["loss_total"]
    assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


def test_items_are_ranked_by_the_scores_after_the_last_item(model, logits):
    result = model.recommend(windows_of(*ROWS), NUM_ITEMS)
    for row, of_row in enumerate(logits):
        expected = of_row[-1].sort(descending=True)
        assert result.items[row].tolist() == expected.indices.tolist()
        assert torch.allclose(result.scores[row], expected.values, atol=1e-5)

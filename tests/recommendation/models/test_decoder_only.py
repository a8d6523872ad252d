"""The decoder-only generator against transformers' T5 decoder."""

import torch

from ..conftest import SIZES, logits_of, randomize, windows_of
from ..t5_stack import causal_stack

HISTORY, TARGET = [3, 8, 0, 29, 11], 17


@torch.no_grad()
def test_each_levels_logits_agree_with_a_t5_decoder(make_model):
    model = make_model("decoder_only").eval()
    randomize(model)
    tokens = model.tokens[:, [*HISTORY, TARGET]].T.reshape(1, -1)
    hidden = causal_stack(model.layers, model.norm, model.bias.weight, model.embedding(tokens[:, :-1]))[0]
    logits = logits_of(model, windows_of([*HISTORY, TARGET]))
    num_levels = len(SIZES)
    for level, head in enumerate(model.heads):
        # Token t predicts token t + 1. The first item's own codes are not targets.
        expected = hidden[num_levels - 1 + level::num_levels] @ head[:SIZES[level]].T
        assert torch.allclose(logits[level], expected, atol=1e-4)


def test_the_first_item_of_a_window_is_not_a_target(make_model):
    model = make_model("decoder_only").eval()
    with torch.no_grad():
        [short], [long] = (logits_of(model, windows_of(row))[:1] for row in ([3, 8], [5, 3, 8]))
    assert (len(short), len(long)) == (1, 2)

"""The T5 blocks against transformers and PyTorch, and dropout."""

import math

import pytest
import torch
import torch.nn.functional as F

from recommendation.models.attention_bias import RelativeBias
from recommendation.models.layers import (
    CrossAttention,
    FeedForward,
    Memory,
    RMSNorm,
    SelfAttention,
    attend,
    dropout,
    initialize,
    join_weights,
    split_heads,
    split_weight,
)


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    # The root mean square of (1, 7) is 5, of (-3, 3) it is 3.
    assert torch.allclose(norm(torch.tensor([[1.0, 7.0], [-3.0, 3.0]])), torch.tensor([[0.2, 2.8], [-1.0, 2.0]]))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 16), (6, 20)])
def test_relative_buckets_agree_with_transformers(bidirectional, num_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    bias = RelativeBias(2, num_buckets, max_distance, bidirectional)
    torch.nn.init.normal_(bias.weight)
    distance = torch.arange(200) - torch.arange(200).unsqueeze(1)
    bucket = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    assert torch.equal(bias(range(200), 200), bias.weight[bucket].permute(2, 0, 1))


def test_a_relative_bias_hides_keys_by_distance():
    bias = RelativeBias(1, 8, 16, bidirectional=False)
    torch.nn.init.zeros_(bias.weight)
    cases = [((range(3), 4, 1), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]),        # no later key
             ((range(4), 4, 2, 2), [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),  # no later group of two
             ((range(2, 5, 2), 4, 0), [[1, 1, 0, 0], [1, 1, 1, 1]]),               # only keys before the query
             ((range(2), 2), [[1, 1], [1, 1]])]
    for arguments, visible in cases:
        assert (bias(*arguments)[0] == 0).int().tolist() == visible
        trained = bias(*arguments).detach()
        with torch.no_grad():
            assert torch.equal(bias(*arguments), trained)


def test_the_parts_of_a_head_are_consecutive_columns():
    x = torch.arange(24).view(2, 1, 12)
    first, second = split_heads(x, 2, 2)
    assert first.tolist() == [[[[0, 1, 2], [12, 13, 14]], [[6, 7, 8], [18, 19, 20]]]]
    assert second.tolist() == [[[[3, 4, 5], [15, 16, 17]], [[9, 10, 11], [21, 22, 23]]]]


def test_a_split_weight_gives_the_parts_of_the_heads():
    weight, x = torch.randn(12, 5), torch.randn(2, 3, 5)
    parts = split_weight(weight, 2, 3)
    for part, expected in zip(parts, split_heads(x @ weight.T, 2, 3), strict=True):
        assert torch.allclose(split_heads(x @ part.T, 2)[0], expected, atol=1e-6)
    assert torch.equal(join_weights(parts, 2), weight)


def test_attention_is_unscaled_and_takes_a_bias():
    query, key, value = torch.randn(3, 2, 4, 5, 6)
    bias = torch.randn(1, 4, 5, 5)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    assert torch.allclose(attend(query, key, value, bias), expected.permute(2, 0, 1, 3).flatten(2), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 5, 7), (3, 1, 1, 7), (3, 4, 1, 7)])
def test_attention_without_gradients_is_the_same(shape):
    query, (key, value), bias = torch.randn(3, 4, 5, 6), torch.randn(2, 3, 4, 7, 6), torch.randn(shape)
    with torch.no_grad():
        without = attend(query, key, value, bias)
    assert torch.allclose(without, attend(query, key, value, bias), atol=1e-5)


def test_dropout_zeroes_its_share_and_scales_up_the_rest():
    torch.manual_seed(0)
    x = dropout(torch.ones(1000, 1000), 0.2, training=True)
    share = (x == 0).float().mean().item()
    assert share == pytest.approx(0.2, abs=1 / 512 + 5 * math.sqrt(0.2 * 0.8 / 1e6))  # the rate has 256 possible values
    assert x.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(0.2 / 0.8 / 1e6))
    assert len(x.unique()) == 2


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation_at_any_rate(rate):
    torch.manual_seed(0)
    x = dropout(torch.full((1_000_000,), 3.0), rate, training=True)
    assert x.mean().item() == pytest.approx(3.0, abs=3 * 5 * math.sqrt(rate / (1 - rate) / 1e6))
    assert (x == 0).float().mean().item() == pytest.approx(rate, abs=1 / 512 + 0.003)


def test_elements_that_share_a_draw_drop_independently():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(100_000, 8), 0.3, training=True) > 0).float()
    correlation = torch.corrcoef(kept.T) - torch.eye(8)
    assert correlation.abs().max() < 5 / math.sqrt(100_000)


def test_dropout_is_reproducible():
    x = torch.randn(5, 7)
    torch.manual_seed(4)
    first = dropout(x, 0.5, training=True)
    second = dropout(x, 0.5, training=True)
    torch.manual_seed(4)
    assert torch.equal(dropout(x, 0.5, training=True), first)
    assert not torch.equal(first, second)


def test_dropout_outside_training_and_at_rate_zero_is_the_identity():
    x = torch.randn(3, 5)
    assert torch.equal(dropout(x, 0.5, training=False), x)
    assert torch.equal(dropout(x, 0.0, training=True), x)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 5, 7), (0, 4)])
def test_dropout_supports_sizes_that_are_not_multiples_of_eight(shape):
    torch.manual_seed(0)
    x = torch.ones(shape)
    assert dropout(x, 0.5, training=True).shape == shape


def test_the_gradient_of_dropout_has_the_same_mask():
    torch.manual_seed(0)
    x = torch.ones(100, requires_grad=True)
    y = dropout(x, 0.5, training=True)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("block", [
    lambda rate: SelfAttention(8, 2, 4, rate), lambda rate: CrossAttention(8, 2, 4, rate),
    lambda rate: FeedForward(8, 16, rate)], ids=["self", "cross", "feed forward"])
def test_a_block_has_dropout_only_in_training(block):
    layer, x = block(0.5), torch.randn(3, 2, 8)
    [memory] = Memory(8, 2, 4, num_layers=1)(x)
    initialize(layer, width=8, head_width=4)
    arguments = {SelfAttention: lambda: (x, torch.zeros(1, 1, 3, 3)), FeedForward: lambda: (x,),
                 CrossAttention: lambda: (x, memory, None)}[type(layer)]()
    layer.train()
    assert not torch.equal(layer(*arguments), layer(*arguments))
    layer.eval()
    assert torch.equal(layer(*arguments), layer(*arguments))

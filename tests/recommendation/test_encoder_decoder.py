"""The encoder-decoder against transformers' T5, and what its windows may see."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from common.errors import ConfigError
from recommendation.models.abstract_model import PADDING
from recommendation.models.encoder_decoder import model as module

from .conftest import NUM_ITEMS, SIZES, randomize, windows_of

HISTORIES = [[3, 8, 0, 29, 11, 3], [17], [5, 21, 2], list(range(10, 22))]
TARGETS = [4, 0, 29, 12]
TOKEN_OFFSETS = [1, 5, 10]  # 0 is padding and start; then 4, 5 and 3 codes


def attention_pairs(ours, theirs) -> list[tuple[Tensor, list[Tensor]]]:
    if hasattr(ours, "qkv"):
        return [(ours.qkv.weight, [theirs.q.weight, theirs.k.weight, theirs.v.weight]),
                (ours.out.weight, [theirs.o.weight])]
    return [(ours.query.weight, [theirs.q.weight]), (ours.key_value.weight, [theirs.k.weight, theirs.v.weight]),
            (ours.out.weight, [theirs.o.weight])]


def weight_pairs(model, t5) -> list[tuple[Tensor, list[Tensor]]]:
    """Each of our weights and those of T5 that it stacks; the heads are left out."""
    pairs = [(model.embedding.weight, [t5.shared.weight])]
    for ours, theirs, bias, norm in ((model.encoder, t5.encoder, model.encoder_bias, model.encoder_norm),
                                     (model.decoder, t5.decoder, model.decoder_bias, model.decoder_norm)):
        first = theirs.block[0].layer[0].SelfAttention
        pairs.append((bias.weight, [first.relative_attention_bias.weight]))
        pairs.append((norm.weight, [theirs.final_layer_norm.weight]))
        for layers, block in zip(ours, theirs.block, strict=True):
            for layer, other in zip(layers, block.layer, strict=True):
                pairs.append((layer.norm.weight, [other.layer_norm.weight]))
                if hasattr(layer, "wi"):
                    pairs += [(layer.wi.weight, [other.DenseReluDense.wi.weight]),
                              (layer.wo.weight, [other.DenseReluDense.wo.weight])]
                else:
                    pairs += attention_pairs(layer, getattr(other, "SelfAttention", None) or other.EncDecAttention)
    return pairs


@pytest.fixture
def tiger(make_model):
    """The encoder-decoder as T5 is: one target, the encoder sees the whole history."""
    model = make_model("encoder_decoder", train_on="target").eval()
    randomize(model)
    return model


@torch.no_grad()
def t5_of(model) -> T5ForConditionalGeneration:
    """transformers' T5 with the model's weights."""
    config = T5Config(vocab_size=1 + sum(SIZES), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2,
                      num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=16,
                      dropout_rate=0.0, feed_forward_proj="relu", tie_word_embeddings=False, pad_token_id=0,
                      decoder_start_token_id=0)
    t5 = T5ForConditionalGeneration(config).eval()
    t5.lm_head.weight = torch.nn.Parameter(torch.zeros(1 + sum(SIZES), 16))  # transformers 5 ties it all the same
    for ours, theirs in weight_pairs(model, t5):
        for part, weight in zip(ours.chunk(len(theirs)), theirs, strict=True):
            weight.copy_(part)
    t5.lm_head.weight[1:] = torch.cat([head.weight for head in model.heads])
    return t5


@pytest.fixture
def t5(tiger):
    return t5_of(tiger)


def test_all_weights_have_a_partner_in_t5(tiger, t5):
    paired = sum(ours.numel() for ours, _ in weight_pairs(tiger, t5)) + sum(h.weight.numel() for h in tiger.heads)
    assert paired == sum(p.numel() for p in tiger.parameters())


@pytest.fixture
def t5_output(t5, catalogue):
    """T5 on the histories' tokens and the targets' as labels."""
    tokens = catalogue.codes + torch.tensor(TOKEN_OFFSETS)
    rows = [tokens[history].flatten() for history in HISTORIES]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return t5(input_ids=input_ids, attention_mask=(input_ids != 0).long(), labels=tokens[TARGETS])


def t5_losses(output, catalogue) -> list[Tensor]:
    """Cross-entropy of each level over its own slice of the vocabulary."""
    return [F.cross_entropy(output.logits[:, level, offset:offset + size], catalogue.codes[TARGETS][:, level])
            for level, (offset, size) in enumerate(zip(TOKEN_OFFSETS, SIZES, strict=True))]


def training_windows():
    return windows_of(*([*history, target] for history, target in zip(HISTORIES, TARGETS, strict=True)))


def test_the_memory_agrees_with_t5(tiger, t5_output):
    memory = tiger.encode(windows_of(*HISTORIES).items)
    for row, history in enumerate(HISTORIES):
        num_tokens = 3 * len(history)
        assert torch.allclose(memory[row, :num_tokens], t5_output.encoder_last_hidden_state[row, :num_tokens],
                              atol=1e-4)


def test_each_levels_logits_agree_with_its_slice_of_t5s(tiger, t5_output):
    logits = logits_of(tiger, training_windows())
    for level, (offset, size) in enumerate(zip(TOKEN_OFFSETS, SIZES, strict=True)):
        assert torch.allclose(logits[level], t5_output.logits[:, level, offset:offset + size], atol=1e-4)


def test_the_loss_agrees_with_t5s_over_each_levels_slice(tiger, t5_output, catalogue):
    loss = tiger.compute_loss(training_windows())["loss_total"]
    assert loss.item() == pytest.approx(torch.stack(t5_losses(t5_output, catalogue)).mean().item(), abs=1e-4)


def test_the_gradients_of_all_weights_agree_with_t5s(tiger, t5, t5_output, catalogue):
    tiger.compute_loss(training_windows())["loss_total"].backward()
    torch.stack(t5_losses(t5_output, catalogue)).mean().backward()
    for ours, theirs in weight_pairs(tiger, t5):
        assert torch.allclose(ours.grad, torch.cat([weight.grad for weight in theirs]), atol=1e-3, rtol=1e-3)
        assert ours.grad.abs().max() > 1e-3
    assert torch.allclose(torch.cat([head.weight.grad for head in tiger.heads]), t5.lm_head.weight.grad[1:], atol=1e-3)


def test_every_position_is_a_t5_whose_tokens_see_the_items_up_to_their_own(everywhere, catalogue):
    with torch.no_grad():
        for name, parameter in everywhere.named_parameters():
            if name.startswith("memory_bias"):  # T5 has none in its cross-attention
                parameter.zero_()
    t5, tokens = t5_of(everywhere), catalogue.codes + torch.tensor(TOKEN_OFFSETS)
    history, target = HISTORIES[0], 4
    item = torch.arange(len(history)).repeat_interleave(len(SIZES))
    memory = t5.encoder(input_ids=tokens[history].view(1, -1), attention_mask=(item <= item.unsqueeze(1))[None, None])
    output = t5(encoder_outputs=memory, labels=tokens[[target]])
    assert torch.allclose(everywhere.encode(torch.tensor([history])), memory.last_hidden_state, atol=1e-4)
    for level, ours in enumerate(teacher_forced(everywhere, history, [target])):
        theirs = output.logits[:, level, TOKEN_OFFSETS[level]:TOKEN_OFFSETS[level] + SIZES[level]]
        assert torch.allclose(ours, theirs.log_softmax(dim=-1), atol=1e-4)


def logits_of(model, windows) -> list[Tensor]:
    """What `compute_loss` feeds the cross-entropy for the P targets that are no padding: (P, C) of each level."""
    logits: list[Tensor] = []
    hooks = [head.register_forward_hook(lambda _, __, output: logits.append(output.detach())) for head in model.heads]
    model.compute_loss(windows)
    for hook in hooks:
        hook.remove()
    if model.train_on == "target":
        return logits
    present = windows.items[:, 1:].flatten() != PADDING
    return [level[present] for level in logits]


def teacher_forced(model, history: list[int], items: list[int]) -> list[Tensor]:
    """Log-probabilities of each level (items, C) where each of the items follows the history, without a cache."""
    logits = logits_of(model, windows_of(*([*history, item] for item in items)))
    num_targets = len(logits[0]) // len(items)  # of a row; the one behind the whole history is its last
    return [level[num_targets - 1::num_targets].log_softmax(dim=-1) for level in logits]


def loss_alone(model, history: list[int], target: int) -> Tensor:
    """The loss of one target by the recommending path: a beam for every item, no other target, no padding."""
    model.num_beams = NUM_ITEMS
    result = model.recommend(windows_of(history), NUM_ITEMS)
    return -result.scores[result.items == target].squeeze() / len(SIZES)


@pytest.fixture
def everywhere(make_model):
    model = make_model("encoder_decoder", train_on="every_position").eval()
    randomize(model)
    return model


def test_every_positions_loss_is_the_mean_of_its_targets_one_at_a_time(everywhere):
    rows = [[3, 8, 0, 29, 11, 3], [0, 17], [5, 21, 2]]
    one_at_a_time = [loss_alone(everywhere, row[:place], row[place])
                     for row in rows for place in range(1, len(row))]
    together = everywhere.compute_loss(windows_of(*rows))["loss_total"]
    assert together.item() == pytest.approx(torch.stack(one_at_a_time).mean().item(), abs=1e-5)


def test_every_positions_gradient_is_the_mean_of_its_targets_one_at_a_time(everywhere):
    row = [3, 8, 0, 29, 11]
    losses = torch.stack([loss_alone(everywhere, row[:place], row[place]) for place in range(1, len(row))])
    expected = torch.autograd.grad(losses.mean(), list(everywhere.parameters()))
    loss = everywhere.compute_loss(windows_of(row))["loss_total"]
    for ours, other in zip(torch.autograd.grad(loss, list(everywhere.parameters())), expected, strict=True):
        assert torch.allclose(ours, other, atol=1e-4)


def test_a_targets_loss_is_that_of_its_history(tiger):
    losses = [loss_alone(tiger, history, target) for history, target in zip(HISTORIES, TARGETS, strict=True)]
    loss = tiger.compute_loss(training_windows())["loss_total"]
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_later_items_do_not_change_earlier_predictions(everywhere):
    row = [3, 8, 0, 29, 11, 3]
    before = logits_of(everywhere, windows_of(row))
    for place in range(1, len(row)):
        after = logits_of(everywhere, windows_of([*row[:place], *([7] * (len(row) - place))]))
        for level in range(len(SIZES)):
            assert torch.equal(after[level][:place - 1], before[level][:place - 1])


def test_a_target_does_not_change_the_prediction_of_its_first_code(model):
    before = logits_of(model, windows_of([3, 8, 0], [5, 21, 2]))[0]
    after = logits_of(model, windows_of([3, 8, 14], [5, 21, 9]))[0]
    assert torch.equal(before, after)


def test_a_code_is_predicted_from_the_ones_before_it_alone(model, catalogue):
    """Two targets that agree in their first code have the same logits for the second, but not for the third."""
    first = catalogue.codes[:, 0]
    one, other = next((a, b) for a in range(NUM_ITEMS) for b in range(a)
                      if first[a] == first[b] and catalogue.codes[a, 1] != catalogue.codes[b, 1])
    before, after = (logits_of(model, windows_of([3, 8, target])) for target in (one, other))
    assert torch.equal(before[1][-1], after[1][-1])
    assert not torch.allclose(before[2][-1], after[2][-1])


def test_padding_changes_nothing(model):
    rows = [3, 8, 0, 29], [5, 21]
    tight, wide = (logits_of(model, windows_of(*rows, width=width)) for width in (0, 9))
    for ours, other in zip(tight, wide, strict=True):
        assert torch.allclose(ours, other, atol=1e-5)
    tight, wide = (model.compute_loss(windows_of(*rows, width=width))["loss_total"] for width in (0, 9))
    assert torch.allclose(tight, wide, atol=1e-5)
    tight, wide = (model.recommend(windows_of(*rows, width=width), 10) for width in (0, 9))
    assert torch.equal(tight.items, wide.items)
    assert torch.allclose(tight.scores, wide.scores, atol=1e-5)


@pytest.mark.parametrize("others", [[[5]], [[5, 9]], [[9, 5]]])
def test_item_zero_is_a_real_item(model, others):
    for history in others:
        with_zero = model.recommend(windows_of([0, *history]), NUM_ITEMS)
        without = model.recommend(windows_of(history), NUM_ITEMS)
        assert not torch.allclose(with_zero.scores, without.scores, atol=1e-3)


def test_item_zero_alone_is_a_history(model):
    assert model.recommend(windows_of([0]), 20).scores.isfinite().all()


def test_every_item_of_the_history_matters(model):
    history = [3, 8, 0, 29, 11]
    scores = model.recommend(windows_of(history), NUM_ITEMS).scores
    for place in range(len(history)):
        changed = [*history[:place], 17, *history[place + 1:]]
        assert not torch.allclose(model.recommend(windows_of(changed), NUM_ITEMS).scores, scores, atol=1e-4)


def test_the_order_of_the_history_matters(model):
    one, other = (model.recommend(windows_of(history), NUM_ITEMS).scores for history in ([3, 8, 11], [8, 3, 11]))
    assert not torch.allclose(one, other, atol=1e-4)


def exact_scores(model, history: list[int]) -> Tensor:
    """(N,) sum of the log-probabilities of each item's codes, by teacher forcing."""
    levels = teacher_forced(model, history, list(range(NUM_ITEMS)))
    return sum(level.gather(1, codes.unsqueeze(1))[:, 0]
               for level, codes in zip(levels, model.catalogue.codes.T, strict=True))


@torch.no_grad()
def test_with_a_beam_for_every_item_the_search_is_exact(model):
    model.num_beams = NUM_ITEMS
    result = model.recommend(windows_of(*HISTORIES), NUM_ITEMS)
    for row, history in enumerate(HISTORIES):
        scores = exact_scores(model, history)
        assert sorted(result.items[row].tolist()) == list(range(NUM_ITEMS))
        assert torch.allclose(result.scores[row], scores[result.items[row]], atol=1e-4)
        assert result.items[row].tolist() == scores.argsort(descending=True).tolist()


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 3, 10])
def test_narrow_beams_still_score_their_items_exactly(model, num_beams):
    model.num_beams = num_beams
    result = model.recommend(windows_of(*HISTORIES), 5)
    assert result.items.shape == (4, 5)
    for row, history in enumerate(HISTORIES):
        items = result.items[row]
        assert len(items.unique()) == 5
        assert torch.allclose(result.scores[row], exact_scores(model, history)[items], atol=1e-4)


@torch.no_grad()
def test_a_batch_of_users_gets_what_each_gets_alone(model):
    together = model.recommend(windows_of(*HISTORIES), 10)
    for row, history in enumerate(HISTORIES):
        alone = model.recommend(windows_of(history), 10)
        assert alone.items[0].tolist() == together.items[row].tolist()
        assert torch.allclose(alone.scores[0], together.scores[row], atol=1e-5)


@torch.no_grad()
def test_decoding_with_the_cache_agrees_with_decoding_without_it(model, catalogue, monkeypatch):
    steps = []
    monkeypatch.setattr(module, "beam_search", lambda step, *_: steps.append(step))
    model.recommend(windows_of(*HISTORIES), 10)
    num_users = len(HISTORIES)
    # Level 1 continues with all four first codes, out of order; level 2 with six items, whose beams these are.
    first = torch.tensor([2, 0, 3, 1])
    items = torch.tensor([7, 0, 29, 12, 7, 18])
    parents = torch.stack([(first == code).nonzero()[0, 0] for code in catalogue.codes[items, 0]])
    start = torch.zeros(num_users, 1, dtype=torch.int64)
    cached = [steps[0](0, start, start), steps[0](1, first.repeat(num_users, 1), start.repeat(1, 4)),
              steps[0](2, catalogue.codes[items, 1].repeat(num_users, 1), parents.repeat(num_users, 1))]
    of_first = [(catalogue.codes[:, 0] == code).nonzero()[0, 0].item() for code in first]
    for row, history in enumerate(HISTORIES):
        for level, targets in enumerate((of_first[:1], of_first, items.tolist())):
            assert torch.allclose(cached[level][row], teacher_forced(model, history, targets)[level], atol=1e-5)


def test_what_to_train_on_is_target_or_every_position(make_model):
    with pytest.raises(ConfigError, match="train_on: is 'last'"):
        make_model("encoder_decoder", train_on="last")


def test_the_training_unit_follows_train_on(make_model):
    assert make_model("encoder_decoder", train_on="target").training_unit == "target"
    assert make_model("encoder_decoder", train_on="every_position").training_unit == "sequence"


def test_label_smoothing_mixes_in_the_mean_of_all_codes(make_model):
    windows = training_windows()
    plain = make_model("encoder_decoder", label_smoothing=0.0).eval()
    smoothed = make_model("encoder_decoder", label_smoothing=0.3).eval()
    uniform = torch.stack([-logits.log_softmax(dim=-1).mean() for logits in logits_of(plain, windows)]).mean()
    expected = 0.7 * plain.compute_loss(windows)["loss_total"] + 0.3 * uniform
    assert smoothed.compute_loss(windows)["loss_total"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_dropout_acts_in_training_and_follows_the_seed(make_model):
    model = make_model("encoder_decoder", dropout=0.3).train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model.compute_loss(training_windows())["loss_total"].item())
    assert losses[0] == losses[1] != losses[2]

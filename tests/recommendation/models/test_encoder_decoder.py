"""The encoder-decoder against transformers' T5, and the masks of its windows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError
from recommendation.models.encoder_decoder.t5 import head_weights, join, to_t5, weight_pairs
from tests.errors import refused

from ..conftest import SIZES, logits_of, randomize, teacher_forced, windows_of
from .test_generator import HISTORIES, TARGETS, loss_alone, training_windows

TOKEN_OFFSETS = [1, 5, 10]  # token 0 is padding and start; the levels have 4, 5 and 3 codes


@pytest.fixture
def tiger(make_model):
    """The encoder-decoder like T5: one target, and the encoder sees the whole history."""
    model = make_model("encoder_decoder", train_on="target").eval()
    randomize(model)
    return model


@pytest.fixture
def t5(tiger):
    return to_t5(tiger)


def test_all_weights_have_a_counterpart_in_t5(tiger, t5):
    paired = sum(ours.numel() for ours, _ in weight_pairs(tiger, t5)) + head_weights(tiger, tiger.heads).numel()
    no_codes = tiger.missing.sum() * tiger.heads.shape[2]  # rows of the heads that have no code
    assert paired + no_codes == sum(p.numel() for p in tiger.parameters())


@pytest.fixture
def t5_output(t5, catalogue):
    """The output of T5 for the tokens of the histories, with the targets as labels."""
    tokens = catalogue.codes + torch.tensor(TOKEN_OFFSETS)
    rows = [tokens[history].flatten() for history in HISTORIES]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return t5(input_ids=input_ids, attention_mask=(input_ids != 0).long(), labels=tokens[TARGETS])


def t5_losses(output, catalogue) -> list[Tensor]:
    """Cross-entropy of each level over its own slice of the vocabulary."""
    return [F.cross_entropy(output.logits[:, level, offset:offset + size], catalogue.codes[TARGETS][:, level])
            for level, (offset, size) in enumerate(zip(TOKEN_OFFSETS, SIZES, strict=True))]


def test_the_memory_agrees_with_t5(tiger, t5_output):
    memory = tiger.encode(windows_of(*HISTORIES).items)
    for row, history in enumerate(HISTORIES):
        num_tokens = 3 * len(history)
        assert torch.allclose(memory[:num_tokens, row], t5_output.encoder_last_hidden_state[row, :num_tokens],
                              atol=1e-4)


def test_each_levels_logits_agree_with_t5(tiger, t5_output):
    logits = logits_of(tiger, training_windows())
    for level, (offset, size) in enumerate(zip(TOKEN_OFFSETS, SIZES, strict=True)):
        assert torch.allclose(logits[level], t5_output.logits[:, level, offset:offset + size], atol=1e-4)


def test_the_loss_agrees_with_t5(tiger, t5_output, catalogue):
    loss = tiger.compute_loss(training_windows())["loss_total"]
    assert loss.item() == pytest.approx(torch.stack(t5_losses(t5_output, catalogue)).mean().item(), abs=1e-4)


def test_the_gradients_of_all_weights_agree_with_t5(tiger, t5, t5_output, catalogue):
    tiger.compute_loss(training_windows())["loss_total"].backward()
    torch.stack(t5_losses(t5_output, catalogue)).mean().backward()
    for ours, theirs in weight_pairs(tiger, t5):
        assert torch.allclose(ours.grad, join(tiger, [weight.grad for weight in theirs]), atol=1e-3, rtol=1e-3)
        assert ours.grad.abs().max() > 1e-3
    assert torch.allclose(head_weights(tiger, tiger.heads.grad), t5.lm_head.weight.grad[1:], atol=1e-3)
    assert not tiger.heads.grad.mul(tiger.missing.transpose(1, 2)).any()


def test_every_position_is_a_causally_masked_t5(make_model, catalogue):
    everywhere = make_model("encoder_decoder", train_on="every_position").eval()
    randomize(everywhere)
    with torch.no_grad():
        for name, parameter in everywhere.named_parameters():
            if name.startswith("memory_bias"):  # T5 has none in its cross-attention
                parameter.zero_()
    t5, tokens = to_t5(everywhere), catalogue.codes + torch.tensor(TOKEN_OFFSETS)
    history, target = HISTORIES[0], 4
    item = torch.arange(len(history)).repeat_interleave(len(SIZES))
    memory = t5.encoder(input_ids=tokens[history].view(1, -1), attention_mask=(item <= item.unsqueeze(1))[None, None])
    output = t5(encoder_outputs=memory, labels=tokens[[target]])
    assert torch.allclose(everywhere.encode(torch.tensor([history]))[:, 0], memory.last_hidden_state[0], atol=1e-4)
    for level, ours in enumerate(teacher_forced(everywhere, history, [target])):
        theirs = output.logits[:, level, TOKEN_OFFSETS[level]:TOKEN_OFFSETS[level] + SIZES[level]]
        assert torch.allclose(ours, theirs.log_softmax(dim=-1), atol=1e-4)


def test_a_target_has_the_loss_of_its_history(tiger):
    losses = [loss_alone(tiger, history, target) for history, target in zip(HISTORIES, TARGETS, strict=True)]
    loss = tiger.compute_loss(training_windows())["loss_total"]
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


@pytest.mark.parametrize("train_on", ["target", "every_position"])
def test_the_encoder_has_one_position_per_item_or_per_code(make_model, train_on):
    items = windows_of(*HISTORIES).items
    for encoder_positions, num_positions in (("item", items.shape[1]), ("code", len(SIZES) * items.shape[1])):
        model = make_model("encoder_decoder", train_on=train_on, encoder_positions=encoder_positions)
        assert model.encode(items).shape == (num_positions, len(items), 16)


def test_an_items_position_is_the_projection_of_its_joined_code_embeddings(make_model, catalogue):
    model = make_model("encoder_decoder", encoder_positions="item").eval()
    model.encoder, model.encoder_norm = torch.nn.ModuleList(), torch.nn.Identity()
    for row, history in zip(model.encode(windows_of(*HISTORIES).items).unbind(1), HISTORIES, strict=True):
        for position, item in zip(row, history, strict=False):
            codes = model.embedding.weight[catalogue.codes[item] + torch.tensor(TOKEN_OFFSETS)]
            assert torch.allclose(position, model.projection.weight @ codes.flatten(), atol=1e-6)


@torch.no_grad()
def test_an_items_position_starts_with_the_variance_of_an_embedding(make_model):
    model = make_model("encoder_decoder", encoder_positions="item", d_model=512)
    model.encoder, model.encoder_norm = torch.nn.ModuleList(), torch.nn.Identity()
    positions = model.encode(torch.arange(30).unsqueeze(1))
    assert positions.std().item() == pytest.approx(model.embedding.weight.std().item(), rel=0.05)


@pytest.mark.parametrize(("key", "value", "choices"), [("train_on", "last", ["target", "every_position"]),
                                                       ("encoder_positions", "token", ["item", "code"])])
def test_an_unknown_word_is_refused(make_model, key, value, choices):
    with refused(ConfigError, f"encoder_decoder.model_params.{key}", names=[f"'{value}'"], fix=choices):
        make_model("encoder_decoder", **{key: value})


def test_the_training_unit_follows_train_on(make_model):
    assert make_model("encoder_decoder", train_on="target").training_unit == "target"
    assert make_model("encoder_decoder", train_on="every_position").training_unit == "sequence"

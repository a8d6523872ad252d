"""The contract of every generator: the masks of its windows, and a search that finds the likeliest items."""

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from recommendation.models.abstract_model import PADDING
from tests.errors import refused

from ..conftest import NUM_ITEMS, SIZES, logits_of, padded, teacher_forced, windows_of

HISTORIES = [[3, 8, 0, 29, 11, 3], [17], [5, 21, 2], list(range(10, 22))]
TARGETS = [4, 0, 29, 12]


def training_windows():
    return windows_of(*([*history, target] for history, target in zip(HISTORIES, TARGETS, strict=True)))


def loss_alone(model, history: list[int], target: int) -> Tensor:
    """The loss of one target from `recommend`, with a beam for every item and no other target or padding."""
    model.num_beams = NUM_ITEMS
    result = model.recommend(windows_of(history), NUM_ITEMS)
    return -result.scores[result.items == target].squeeze() / len(SIZES)


@pytest.mark.slow
def test_every_positions_loss_is_the_mean_over_single_targets(everywhere):
    rows = [[3, 8, 0, 29, 11, 3], [0, 17], [5, 21, 2]]
    one_at_a_time = [loss_alone(everywhere, row[:place], row[place])
                     for row in rows for place in range(1, len(row))]
    together = everywhere.compute_loss(windows_of(*rows))["loss_total"]
    assert together.item() == pytest.approx(torch.stack(one_at_a_time).mean().item(), abs=1e-5)


@pytest.mark.parametrize("encoder_positions", ["item", "code"])
@pytest.mark.parametrize("normalize_over", ["codebook", "valid_items"])
def test_one_targets_loss_is_its_items_negative_score(make_model, normalize_over, encoder_positions):
    model = make_model("encoder_decoder", train_on="target", normalize_over=normalize_over,
                       encoder_positions=encoder_positions).eval()
    losses = [loss_alone(model, history, target) for history, target in zip(HISTORIES, TARGETS, strict=True)]
    together = model.compute_loss(training_windows())["loss_total"]
    assert together.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


@pytest.mark.slow
def test_every_positions_gradient_is_the_mean_over_single_targets(everywhere):
    row = [3, 8, 0, 29, 11]
    losses = torch.stack([loss_alone(everywhere, row[:place], row[place]) for place in range(1, len(row))])
    expected = torch.autograd.grad(losses.mean(), list(everywhere.parameters()))
    loss = everywhere.compute_loss(windows_of(row))["loss_total"]
    for ours, other in zip(torch.autograd.grad(loss, list(everywhere.parameters())), expected, strict=True):
        assert torch.allclose(ours, other, atol=1e-4)


def test_later_items_do_not_change_earlier_predictions(everywhere):
    row = [3, 8, 0, 29, 11, 3]
    before = logits_of(everywhere, windows_of(row))
    for place in range(1, len(row)):
        after = logits_of(everywhere, windows_of([*row[:place], *([7] * (len(row) - place))]))
        for level in range(len(SIZES)):
            assert torch.equal(after[level][:place - 1], before[level][:place - 1])


def test_a_target_does_not_change_its_first_codes_logits(model):
    before = logits_of(model, windows_of([3, 8, 0], [5, 21, 2]))[0]
    after = logits_of(model, windows_of([3, 8, 14], [5, 21, 9]))[0]
    assert torch.equal(before, after)


def test_a_code_is_predicted_only_from_earlier_codes(model, catalogue):
    """Two targets with the same first code have the same logits for the second code, but not for the third."""
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


@pytest.mark.slow
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


@pytest.mark.slow
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
def test_users_get_the_same_items_in_a_batch_and_alone(model):
    together = model.recommend(windows_of(*HISTORIES), 10)
    for row, history in enumerate(HISTORIES):
        alone = model.recommend(windows_of(history), 10)
        assert alone.items[0].tolist() == together.items[row].tolist()
        assert torch.allclose(alone.scores[0], together.scores[row], atol=1e-5)


@torch.no_grad()
def test_decoding_with_the_cache_agrees_with_decoding_without_it(model, catalogue):
    step = model.start_decoding(windows_of(*HISTORIES))
    num_users = len(HISTORIES)
    # Level 1 has a beam for each of the four first codes, out of order. Level 2 has a beam for each of six items.
    first = torch.tensor([2, 0, 3, 1])
    items = torch.tensor([7, 0, 29, 12, 7, 18])
    parents = torch.stack([(first == code).nonzero()[0, 0] for code in catalogue.codes[items, 0]])
    start = torch.zeros(num_users, 1, dtype=torch.int64)
    cached = [step(0, start, start), step(1, first.repeat(num_users, 1), start.repeat(1, 4)),
              step(2, catalogue.codes[items, 1].repeat(num_users, 1), parents.repeat(num_users, 1))]
    of_first = [(catalogue.codes[:, 0] == code).nonzero()[0, 0].item() for code in first]
    for row, history in enumerate(HISTORIES):
        for level, targets in enumerate((of_first[:1], of_first, items.tolist())):
            expected = teacher_forced(model, history, targets)[level]
            assert torch.allclose(cached[level][row].log_softmax(dim=-1), expected, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("normalize_over", ["codebook", "valid_items"])
def test_exact_scoring_agrees_with_a_beam_for_every_item(model, normalize_over, monkeypatch):
    model.num_beams, model.normalize_over = NUM_ITEMS, normalize_over
    histories, seen = windows_of(*HISTORIES), padded(*HISTORIES[1:], HISTORIES[0][:5])
    searched = [model.recommend(histories, 20), model.recommend_unseen(histories, seen, 20)]
    model.scoring = "exact"
    for num_bytes in (2**28, 1):  # all histories at a time, and one at a time
        monkeypatch.setattr("recommendation.models.generator.EXACT_BYTES", num_bytes)
        exact = [model.recommend(histories, 20), model.recommend_unseen(histories, seen, 20)]
        for ours, theirs in zip(exact, searched, strict=True):
            assert torch.equal(ours.items, theirs.items)
            assert torch.allclose(ours.scores, theirs.scores, atol=1e-5)


@torch.no_grad()
def test_over_existing_codes_the_scores_are_normalized_among_existing_codes(model, catalogue):
    model.num_beams, model.normalize_over = NUM_ITEMS, "valid_items"
    result = model.recommend(windows_of(*HISTORIES), NUM_ITEMS)
    model.normalize_over = "codebook"  # for `teacher_forced`
    assert torch.allclose(result.scores.exp().sum(dim=1), torch.ones(len(HISTORIES)), atol=1e-5)
    codes = catalogue.codes
    for row, history in enumerate(HISTORIES):
        levels = teacher_forced(model, history, list(range(NUM_ITEMS)))
        for item in (0, 17, 29):
            score = 0.0
            for level, log_probs in enumerate(levels):
                siblings = codes[(codes[:, :level] == codes[item, :level]).all(dim=1), level].unique()
                score += (log_probs[item, codes[item, level]] - log_probs[item, siblings].logsumexp(0)).item()
            assert result.scores[row][result.items[row] == item].item() == pytest.approx(score, abs=1e-4)


NAMES = pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])


@NAMES
def test_label_smoothing_uses_all_codes(make_model, name):
    windows = training_windows()
    plain = make_model(name, label_smoothing=0.0).eval()
    smoothed = make_model(name, label_smoothing=0.3).eval()
    uniform = torch.stack([-logits.log_softmax(dim=-1).mean() for logits in logits_of(plain, windows)]).mean()
    expected = 0.7 * plain.compute_loss(windows)["loss_total"] + 0.3 * uniform
    assert smoothed.compute_loss(windows)["loss_total"].item() == pytest.approx(expected.item(), abs=1e-5)


@NAMES
def test_label_smoothing_over_existing_codes_uses_only_existing_codes(make_model, name, catalogue):
    windows = training_windows()
    plain = make_model(name, normalize_over="valid_items", label_smoothing=0.0).eval()
    smoothed = make_model(name, normalize_over="valid_items", label_smoothing=0.3).eval()
    targets = torch.tensor(TARGETS)
    if plain.training_unit == "sequence":
        targets = windows.items[:, 1:][windows.items[:, 1:] != PADDING]
    evenly = []
    for level, logits in enumerate(logits_of(plain, windows)):
        for target, row in zip(catalogue.codes[targets], logits, strict=True):
            siblings = catalogue.codes[(catalogue.codes[:, :level] == target[:level]).all(dim=1), level].unique()
            evenly.append(-row[siblings].log_softmax(dim=0).mean())
    expected = 0.7 * plain.compute_loss(windows)["loss_total"] + 0.3 * torch.stack(evenly).mean()
    assert smoothed.compute_loss(windows)["loss_total"].item() == pytest.approx(expected.item(), abs=1e-5)


@NAMES
def test_dropout_acts_in_training_and_follows_the_seed(make_model, name):
    model = make_model(name, dropout=0.3).train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model.compute_loss(training_windows())["loss_total"].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("key", "choices"), [("scoring", ["beam", "exact"]),
                                              ("normalize_over", ["codebook", "valid_items"])])
@NAMES
def test_an_unknown_choice_is_refused(make_model, name, key, choices):
    with refused(ConfigError, f"{name}.model_params.{key}", names=["'all'"], fix=choices):
        make_model(name, **{key: "all"})


@pytest.mark.parametrize("over", ["codebook", "valid_items"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_level_learns_the_distribution_of_the_codes_after_the_prefix(make_model, catalogue, over, smoothing):
    model = make_model("encoder_decoder", normalize_over=over, label_smoothing=smoothing)
    torch.manual_seed(0)
    items = torch.tensor([3, 0, PADDING, 17])
    hidden, likely = torch.randn(len(SIZES), 4, 16), torch.randint(NUM_ITEMS, (4, 12))
    likely[:, 0] = items.clamp(min=0)  # the target itself is one of the items
    shares = torch.rand(4, 12).softmax(dim=1)
    distributions = torch.zeros(4, NUM_ITEMS).scatter_add(1, likely, shares)
    codes, logits, losses = catalogue.codes, model.logits(hidden), []
    for column in (0, 1, 3):
        for level, size in enumerate(SIZES):
            sharing = (codes[:, :level] == codes[items[column], :level]).all(dim=1)
            wanted = torch.zeros(size).index_add_(0, codes[:, level], distributions[column] * sharing)
            exists = torch.ones(size, dtype=torch.bool)
            if over == "valid_items":
                exists = torch.zeros(size, dtype=torch.bool).index_fill_(0, codes[sharing, level], True)
            log_probs = logits[level, column, :size][exists].log_softmax(dim=0)
            wanted = (1 - smoothing) * wanted[exists] / wanted.sum() + smoothing / exists.sum()
            losses.append(-(wanted * log_probs).sum())
    found = model.code_loss(hidden, items, (likely, shares))
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


class Uniform:
    """A teacher that draws every item with the same probability.

    With `only_drawn`, it gives all probability to one drawn item.
    """

    def __init__(self, only_drawn: bool):
        self.only_drawn = only_drawn

    def distributions(self, events, targets):
        if self.only_drawn:
            return torch.randint(NUM_ITEMS, (*targets.shape, 1)), torch.ones(*targets.shape, 1)
        shape = (*targets.shape, NUM_ITEMS)
        return torch.arange(NUM_ITEMS).expand(shape), torch.full(shape, 1 / NUM_ITEMS)


@pytest.mark.parametrize("over", ["codebook", "valid_items"])
def test_distributions_have_the_mean_loss_of_drawn_targets_and_less_noise(make_model, over):
    model = make_model("encoder_decoder", train_on="every_position", normalize_over=over)
    torch.manual_seed(0)
    losses = []
    for only_drawn in (False, True):
        windows = windows_of([3, 8, 3, 29, 11], [0, 4])._replace(starts=torch.zeros(2), teacher=Uniform(only_drawn))
        with torch.no_grad():
            losses.append(torch.stack([model.compute_loss(windows)["loss_total"] for _ in range(100)]))
    exact, drawn = losses
    assert exact.mean().item() == pytest.approx(drawn.mean().item(), abs=4 * drawn.std().item() / 10)
    assert exact.std() < drawn.std()

"""Parallel codes against a T5 decoder and scores by hand; the graph search against exact scores."""

import pytest
import torch
import torch.nn.functional as F

from recommendation.models.abstract_model import Catalogue

from ..conftest import NUM_ITEMS, SIZES, padded, random_codes, randomize, windows_of
from ..t5_stack import causal_stack

ROWS = [[3, 8, 0, 29, 11], [5, 21]]
TEMPERATURE = 0.5


@pytest.fixture
def model(make_model):
    model = make_model("encoder_retrieve", num_heads=2, temperature=TEMPERATURE).eval()
    randomize(model)
    return model


@torch.no_grad()
def log_probs(model, row: list[int]) -> list[torch.Tensor]:
    """(row length, C) of each level, step by step."""
    codes = model.catalogue.codes
    words = model.codewords.weight.view(len(SIZES), max(SIZES), -1)
    x = sum(words[level][codes[row, level]] for level in range(len(SIZES))) + model.positions.weight[: len(row)]
    hidden = causal_stack(model.layers, model.norm, None, x.unsqueeze(0))[0]
    return [(F.cosine_similarity((hidden @ model.heads[level]).unsqueeze(1), words[level][:size].unsqueeze(0), dim=2)
             / TEMPERATURE).log_softmax(dim=1) for level, size in enumerate(SIZES)]


def scores(model, row: list[int]) -> torch.Tensor:
    """(N,) score of each item after the row: the sum of the log-probabilities of its codes."""
    codes = model.catalogue.codes
    return sum(level[-1][codes[:, number]] for number, level in enumerate(log_probs(model, row)))


def test_the_loss_is_the_mean_over_all_next_codes(model):
    codes = model.catalogue.codes
    losses = [-level[place - 1, codes[row[place], number]] for row in ROWS
              for number, level in enumerate(log_probs(model, row)) for place in range(1, len(row))]
    loss = model.compute_loss(windows_of(*ROWS))["loss_total"]
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_label_smoothing_uses_the_codes_of_each_level(model):
    plain = model.compute_loss(windows_of(*ROWS))["loss_total"].item()
    uniform = torch.stack([-level[place - 1].mean() for row in ROWS for level in log_probs(model, row)
                           for place in range(1, len(row))]).mean().item()
    model.label_smoothing = 0.3
    smoothed = model.compute_loss(windows_of(*ROWS))["loss_total"].item()
    assert smoothed == pytest.approx(0.7 * plain + 0.3 * uniform, abs=1e-4)


def over_items(model, row: list[int]) -> list[torch.Tensor]:
    """(N,) log-probability of each item among all items, at each place of a row, from the sum of its logits."""
    codes = model.catalogue.codes
    levels = log_probs(model, row)  # differ from the logits by a constant for each level, which softmax cancels
    return [sum(level[place][codes[:, number]] for number, level in enumerate(levels)).log_softmax(dim=0)
            for place in range(len(row))]


def test_over_existing_ids_the_loss_is_over_items(model):
    model.normalize_over = "valid_items"
    rows = [over_items(model, row) for row in ROWS]
    losses = [-of_row[place - 1][row[place]] for row, of_row in zip(ROWS, rows, strict=True)
              for place in range(1, len(row))]
    assert model.compute_loss(windows_of(*ROWS))["loss_total"].item() == pytest.approx(
        torch.stack(losses).mean().item(), abs=1e-4)
    evenly = torch.stack([-of_row[place].mean() for of_row in rows for place in range(len(of_row) - 1)]).mean()
    model.label_smoothing = 0.3
    assert model.compute_loss(windows_of(*ROWS))["loss_total"].item() == pytest.approx(
        (0.7 * torch.stack(losses).mean() + 0.3 * evenly).item(), abs=1e-4)
    with torch.no_grad():
        result = model.recommend(windows_of(*ROWS), NUM_ITEMS)
    for place, of_row in enumerate(rows):
        assert torch.allclose(result.scores[place], of_row[-1].sort(descending=True).values, atol=1e-4)
        assert torch.allclose(of_row[-1][result.items[place]], result.scores[place], atol=1e-4)


@torch.no_grad()
def test_exact_scores_are_sums_over_the_codes_of_every_item(model):
    result = model.recommend(windows_of(*ROWS), NUM_ITEMS)
    for row, history in enumerate(ROWS):
        expected = scores(model, history).sort(descending=True)
        assert torch.allclose(result.scores[row], expected.values, atol=1e-4)
        assert torch.allclose(scores(model, history)[result.items[row]], result.scores[row], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("normalize_over", ["codebook", "valid_items"])
def test_a_walk_that_visits_every_item_is_exact(model, normalize_over):
    model.normalize_over = normalize_over
    exact = model.recommend(windows_of(*ROWS), 20)
    model.scoring, model.num_beams, model.num_neighbours = "graph", NUM_ITEMS, 3
    model.prepare()
    walked = model.recommend(windows_of(*ROWS), 20)
    assert torch.equal(walked.items, exact.items)
    # Over existing IDs the scores are not normalized; they differ by one constant for each history.
    difference = walked.scores - exact.scores
    constant = difference[:, :1] if normalize_over == "valid_items" else torch.zeros(1)
    assert torch.allclose(difference, constant, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [2, NUM_ITEMS])
def test_a_walk_finds_enough_unseen_items(model, num_beams):
    seen = [[item for item in range(NUM_ITEMS) if item % 3], list(range(NUM_ITEMS - 2))]
    exact = model.recommend_unseen(windows_of(*ROWS), padded(*seen), 6)
    model.scoring, model.num_beams, model.num_neighbours = "graph", num_beams, 3
    model.prepare()
    walked = model.recommend_unseen(windows_of(*ROWS), padded(*seen), 6)
    unseen = [set(items) - {-1} - set(of_row) for items, of_row in zip(walked.items.tolist(), seen, strict=True)]
    assert [len(items) for items in unseen] == [6, 2]
    if num_beams == NUM_ITEMS:
        assert torch.equal(walked.items, exact.items)
        assert torch.allclose(walked.scores, exact.scores, atol=1e-5)


@torch.no_grad()
def test_a_walk_continues_from_seen_items(model):
    model.scoring, model.num_beams, model.num_neighbours, model.num_hops = "graph", 3, 3, 2
    model.prepare()
    history = windows_of(ROWS[0])
    model.graph = Watched(model.graph)
    walked = model.recommend(history, 3)
    visited = set(model.graph.visited)
    model.graph.visited.clear()
    others = model.recommend_unseen(history, walked.items, 3)
    assert visited <= model.graph.visited
    assert not set(others.items[0].tolist()) & set(walked.items[0].tolist())


@torch.no_grad()
def test_a_walk_keeps_unseen_items_ranked_after_seen_ones(model):
    history = windows_of(ROWS[0])
    starts = model._starts(history, 2)[0].unique().tolist()
    best = sorted(starts, key=lambda item: -scores(model, ROWS[0])[item])
    model.num_beams, model.graph = 2, torch.arange(NUM_ITEMS).unsqueeze(1)  # each item is its only neighbour
    assert model.recommend_unseen(history, padded(best[:2]), 1).items.tolist() == [[best[2]]]


@torch.no_grad()
def test_a_walk_starts_at_the_newest_and_random_items(model):
    model.num_beams = 3
    starts = model._starts(windows_of(*ROWS), 3)
    random = starts[0, 3:].tolist()
    assert starts.tolist() == [[11, 29, 0, *random], [21, 5, random[2], *random]]
    assert len(set(random)) == 3


@torch.no_grad()
def test_the_graph_joins_items_with_the_most_similar_codewords(model, monkeypatch):
    model.num_neighbours = 4
    words = F.normalize(model.codewords.weight, dim=1).view(len(SIZES), max(SIZES), -1)
    vectors = torch.cat([words[level][model.catalogue.codes[:, level]] for level in range(len(SIZES))], dim=1)
    expected = (vectors @ vectors.T).topk(4, dim=1)
    for num_bytes in (2**28, 4 * NUM_ITEMS * 7):  # in one part, and seven rows at a time
        monkeypatch.setattr("recommendation.models.encoder_retrieve.model.ROW_BYTES", num_bytes)
        graph = model._build_graph()
        assert torch.allclose((vectors.unsqueeze(1) * vectors[graph]).sum(dim=2), expected.values, atol=1e-5)
    assert all(item in row for item, row in enumerate(graph.tolist()))


class Watched:
    """A graph that records the items it leads to."""

    def __init__(self, graph: torch.Tensor):
        self.graph, self.visited = graph, set()

    def index_select(self, dim: int, beams: torch.Tensor) -> torch.Tensor:
        neighbours = self.graph.index_select(dim, beams)
        self.visited.update(neighbours.flatten().tolist())
        return neighbours


@pytest.mark.slow
@torch.no_grad()
def test_a_walk_finds_the_best_and_scores_few_items(make_model):
    num_items = 8000
    codes = random_codes(num_items, [20, 20, 20])
    model = make_model("encoder_retrieve", of=Catalogue(num_items, codes, [20, 20, 20]), scoring="graph", num_beams=30,
                       num_neighbours=20, num_hops=4).eval()
    exact = model.recommend(windows_of(*ROWS), 10)
    model.prepare()
    for row, history in enumerate(ROWS):
        model.graph = Watched(getattr(model.graph, "graph", model.graph))
        walked = model.recommend(windows_of(history), 10)
        assert len(model.graph.visited) < num_items / 4
        assert len(set(walked.items[0].tolist()) & set(exact.items[row].tolist())) >= 8
        assert len(set(walked.items[0].tolist())) == 10


@torch.no_grad()
def test_scores_are_exact_until_the_graph_is_built(model):
    exact = model.recommend(windows_of(*ROWS), 5)
    model.scoring, model.num_beams, model.num_neighbours, model.num_hops = "graph", 5, 1, 1
    assert torch.equal(model.recommend(windows_of(*ROWS), 5).items, exact.items)
    model.prepare()
    assert model.graph.shape == (NUM_ITEMS, 1)

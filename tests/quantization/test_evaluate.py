"""Metrics of codes worked out by hand, and the reference data for them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.artifacts import DatasetFolder
from quantization import evaluate
from quantization.evaluate import EvaluationData, Evaluator, Prefixes, Reference, consecutive, gini, perplexity, to_host
from quantization.models.abstract_vq import AbstractVQ

from .tiny_data import save_embedding, save_interactions, save_items

NO_REFERENCE = EvaluationData(None, None)
CPU = torch.device("cpu")


def prefixes(codes: object) -> Prefixes:
    return Prefixes(torch.as_tensor(codes))


def collision_rate(codes: object) -> float:
    return evaluate.collision_rate(prefixes(codes))


def code_metrics(codes: list, sizes: list[int]) -> dict:
    return to_host(evaluate.code_metrics(torch.tensor(codes), sizes, prefixes(codes)))


def similarity_metrics(codes: object, directions: object = None, pairs: object = None) -> dict:
    data = EvaluationData(directions if directions is None else np.array(directions, dtype=np.float32), pairs)
    return to_host(evaluate.similarity_metrics(prefixes(codes), Reference(data, CPU)))


def test_collision_rate_counts_items_without_their_own_id():
    assert collision_rate([[0, 1], [0, 1], [2, 3], [4, 5]]) == 0.25  # 4 items, 3 distinct IDs


def test_collision_rate_of_distinct_and_of_equal_codes():
    assert collision_rate([[0], [1], [2]]) == 0.0
    assert collision_rate(np.zeros((5, 2), dtype=int)) == pytest.approx(0.8)


def test_groups_are_the_items_with_the_same_first_codes():
    grouped = prefixes([[1, 1], [0, 2], [1, 1], [1, 3], [0, 2], [5, 0]])
    assert grouped.order.tolist() == [1, 4, 0, 2, 3, 5]
    assert grouped.groups.tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 2, 3]]
    assert [grouped.sizes(level).tolist() for level in range(2)] == [[2, 3, 1], [2, 2, 1, 1]]
    assert [grouped.parents(level).tolist() for level in range(2)] == [[0, 1, 1, 2], [0, 0, 1, 1, 2, 3]]


@pytest.mark.parametrize(("counts", "value"), [
    ([2, 0, 2, 0, 2, 2], 4.0),   # evenly used codes count, dead ones do not
    ([0, 3], 1.0),
    ([2, 1, 1], 2**1.5),         # shares 1/2, 1/4, 1/4 have an entropy of 1.5 bits
])
def test_perplexity_is_the_number_of_evenly_used_codes(counts, value):
    assert perplexity(torch.tensor(counts)).item() == pytest.approx(value)


@pytest.mark.parametrize(("counts", "value"), [
    ([5, 5, 5, 5], 0.0),
    ([1, 3], 0.25),              # the mean difference of all pairs is 1, twice the mean is 4
    ([3, 1], 0.25),
    ([1, 2, 3, 4], 0.25),        # 20 / 16 over twice 2.5
    ([0, 0, 0, 8], 0.75),        # one code has all items: 1 - 1/K
])
def test_gini_by_hand(counts, value):
    assert gini(torch.tensor(counts)).item() == pytest.approx(value)


@given(arrays.arrays(np.int64, st.integers(1, 12), elements=st.integers(0, 9)).filter(lambda counts: counts.any()))
def test_gini_is_half_the_relative_mean_difference(counts):
    difference = sum(abs(int(a) - int(b)) for a in counts for b in counts) / len(counts)**2
    assert gini(torch.tensor(counts)).item() == pytest.approx(difference / 2 / counts.mean())


def test_code_metrics_by_hand():
    assert code_metrics([[0, 0], [0, 0], [1, 3], [2, 3]], [4, 8]) == {
        "collision_rate": 0.25, "largest_bucket": 2, "utilization": [3 / 4, 2 / 8], "num_dead_codes": [1, 6],
        "perplexity": [pytest.approx(2**1.5), pytest.approx(2.0)],
        "gini": [pytest.approx(6 / 16), pytest.approx(6 / 8)]}  # counts 0, 1, 1, 2; and 2, 2 of eight


def test_unknown_codebook_sizes_are_inferred_from_the_codes():
    class Pairs(Halves):
        def get_codes(self, xs):
            return 3 * (xs > 0).long() + torch.tensor([0, 5])

    metrics, _ = Evaluator(Pairs(), torch.tensor([[-1.0, -1.0], [1.0, -1.0]]), 2, NO_REFERENCE).evaluate()
    assert metrics["utilization"] == [2 / 4, 1 / 6]


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_a_short_last_batch_is_weighted_by_its_items(make_rqvae, xs, batch_size):
    model = make_rqvae().eval()
    with torch.no_grad():
        metrics, codes = Evaluator(model, xs, batch_size, NO_REFERENCE).evaluate()
        whole = model.compute_loss(model(xs), xs)
    assert metrics["loss_total"] == pytest.approx(whole["loss_total"].item(), rel=1e-5)
    assert metrics["reconstruction_error"] == pytest.approx(whole["recon_loss"].item(), rel=1e-5)
    assert codes.tolist() == model.get_codes(xs).tolist()
    assert all(math.isfinite(value) for value in metrics["perplexity"])


class Halves(AbstractVQ):
    """One column; an item is coded by its sign, and reconstructed as -2 or 2."""

    def __init__(self):
        super().__init__({})

    def forward(self, xs):
        return torch.where(xs > 0, 2.0, -2.0), xs.new_zeros(()), self.get_codes(xs)

    def get_codes(self, xs):
        return (xs > 0).long()

    def compute_loss(self, forward_outputs, original_xs):
        return {"loss_total": (forward_outputs[0] - original_xs).square().mean()}


class Numbers(Halves):
    """Reads only item numbers, and therefore has no reconstruction."""

    def forward(self, xs):
        return xs, torch.zeros(()), self.get_codes(xs)

    def compute_loss(self, forward_outputs, original_xs):
        return {"loss_total": forward_outputs[1]}


@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_explained_variance_is_the_share_kept_by_the_reconstruction(batch_size):
    # Variance of -3, -1, 1, 3 is 5; every reconstruction is off by 1: 1 - 1/5.
    metrics, _ = Evaluator(Halves(), torch.tensor([[-3.0], [-1.0], [1.0], [3.0]]), batch_size, NO_REFERENCE).evaluate()
    assert metrics["reconstruction_error"] == 1.0
    assert metrics["explained_variance"] == pytest.approx(0.8)


@pytest.mark.parametrize("value", [1.0, 0.1, 0.7])
def test_without_variance_no_variance_is_explained(value):
    metrics, _ = Evaluator(Halves(), torch.full((1000, 1), value), 300, NO_REFERENCE).evaluate()
    assert metrics["explained_variance"] is None


def test_a_model_without_reconstruction_has_no_reconstruction_metrics():
    metrics, codes = Evaluator(Numbers(), torch.arange(4).unsqueeze(1), 3, NO_REFERENCE).evaluate()
    assert not {"reconstruction_error", "explained_variance"} & set(metrics)
    assert codes.tolist() == [[0], [1], [1], [1]]


PAIRS = np.array([[0, 1], [1, 2], [2, 3], [3, 0]])
EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def test_similarity_within_groups_by_hand():
    # Pairs: east-east 1, and north-west, west-west, north-west; the fifth item is alone.
    metrics = similarity_metrics([[0], [2], [2], [0], [1], [2]], [EAST, NORTH, WEST, EAST, NORTH, WEST])
    assert metrics["prefix_similarity"] == [pytest.approx((1 + 0 + 0 + 1) / 4)]


def test_a_zero_vector_has_similarity_0():
    metrics = similarity_metrics([[0], [0], [0]], [EAST, EAST, [0.0, 0.0]])
    assert metrics["prefix_similarity"] == [pytest.approx(1 / 3)]


def test_groups_of_one_item_have_no_similarity():
    assert similarity_metrics([[0], [1], [2]], np.eye(3))["prefix_similarity"] == [None]


def test_a_single_item_has_no_similarity():
    assert similarity_metrics([[0]], [EAST]) == {
        "random_pairs_similarity": None, "prefix_similarity": [None], "prefix_coherence": [None]}


def test_metrics_do_not_wait_for_the_device():
    codes = torch.randint(4, (50, 3), generator=torch.Generator().manual_seed(0))
    grouped, data = prefixes(codes), EvaluationData(np.ones((50, 70), dtype=np.float32), PAIRS)
    reference = Reference(data, CPU)
    for owner in (grouped, reference):  # `meta` has no data: an operation that needs data on the host raises an error
        vars(owner).update({name: value.to("meta") for name, value in vars(owner).items() if torch.is_tensor(value)})
    metrics = evaluate.code_metrics(codes.to("meta"), [4, 4, 4], grouped)
    metrics |= evaluate.similarity_metrics(grouped, reference)
    assert all(metric.device.type == "meta" for metric in metrics.values())


@st.composite
def coded_directions(draw) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, L) and unit vectors (N, D); the largest D takes several passes over the columns."""
    count, width = draw(st.integers(1, 14)), draw(st.sampled_from([1, 3, 80]))
    codes = draw(arrays.arrays(np.int64, (count, draw(st.integers(1, 3))), elements=st.integers(0, 2)))
    vectors = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(count, width))
    return codes, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@given(coded_directions())
def test_prefix_similarity_is_the_mean_over_pairs_with_equal_prefixes(drawn):
    codes, directions = drawn
    means = []
    for length in range(1, codes.shape[1] + 1):
        cosines = [float(directions[i].astype(float) @ directions[j])
                   for i in range(len(codes)) for j in range(i) if (codes[i, :length] == codes[j, :length]).all()]
        means.append(pytest.approx(sum(cosines) / len(cosines), abs=1e-12) if cosines else None)
    assert similarity_metrics(codes, directions)["prefix_similarity"] == means


def test_coherence_is_the_similarity_ratio_to_random_pairs():
    # Two of six pairs have equal directions, 1/3; all pairs that share a code have.
    metrics = similarity_metrics([[0, 0], [0, 1], [1, 0], [1, 0]], [EAST, EAST, NORTH, NORTH])
    assert metrics == {"random_pairs_similarity": pytest.approx(1 / 3), "prefix_similarity": [1.0, 1.0],
                       "prefix_coherence": [pytest.approx(3.0), pytest.approx(3.0)]}


def test_a_prefix_length_without_pairs_has_no_coherence():
    metrics = similarity_metrics([[0, 0], [0, 1]], [EAST, EAST])
    assert metrics["prefix_similarity"] == [1.0, None]
    assert metrics["prefix_coherence"] == [1.0, None]


def test_a_random_similarity_near_0_gives_no_ratio():
    for vectors in ([EAST, NORTH, WEST, NORTH], [EAST, WEST, EAST, WEST]):  # 0 and below
        metrics = similarity_metrics([[0], [1], [0], [1]], vectors)
        assert metrics["random_pairs_similarity"] < 0.01
        assert metrics["prefix_similarity"][0] is not None
        assert metrics["prefix_coherence"] == [None]

@pytest.mark.parametrize(("codes", "pairs", "same", "chance"), [
    # 0-1 and 2-3 of four pairs. By chance: half of either column has code 0, half code 1: 1/4 + 1/4.
    ([[0], [0], [1], [1]], PAIRS, 1 / 2, 1 / 2),
    # 0-1 and 2-3 of three pairs. First column 5 5 3, second 5 3 3: 2/3 * 1/3 + 1/3 * 2/3.
    ([[5, 9], [5, 9], [3, 9], [3, 9]], PAIRS[:3], 2 / 3, 4 / 9),
])
def test_behavioural_coherence_is_the_ratio_to_chance(codes, pairs, same, chance):
    assert similarity_metrics(codes, pairs=pairs) == {
        "same_first_code": pytest.approx(same), "same_first_code_by_chance": pytest.approx(chance),
        "behavioral_coherence": pytest.approx(same / chance)}


def test_pairs_without_equal_codes_have_no_behavioural_coherence():
    # The first item of every pair has code 0, the second code 1: chance is 0, too.
    metrics = similarity_metrics([[0], [0], [1], [1]], pairs=np.array([[0, 2], [1, 3]]))
    assert metrics["same_first_code"] == 0.0
    assert metrics["behavioral_coherence"] is None


def test_without_reference_data_there_are_no_further_metrics():
    assert similarity_metrics([[0], [1]]) == {}
    assert similarity_metrics([[0], [1]], pairs=np.zeros((0, 2), dtype=np.int64)) == {}


@pytest.fixture
def folder(tmp_path) -> DatasetFolder:
    """Four items without embeddings."""
    return save_items(DatasetFolder(tmp_path, "Tiny"), num_items=4)


EVENTS = [  # user, item, split
    (0, 0, "train"), (0, 1, "train"), (0, 1, "train"), (0, 2, "train"), (0, 3, "valid"), (0, 0, "test"),
    (1, 3, "train"), (1, 2, "train"), (1, 1, "valid"), (1, 0, "test")]


def test_consecutive_items_are_neighbours_in_one_users_training_events(folder):
    save_interactions(folder, EVENTS)
    assert consecutive(folder).tolist() == [[0, 1], [1, 2], [3, 2]]  # neither 1-1 nor 2-3 across the users


def test_held_out_events_do_not_change_the_pairs(folder):
    save_interactions(folder, EVENTS)
    before = consecutive(folder)
    save_interactions(folder, [(user, item if split == "train" else 3 - item, split) for user, item, split in EVENTS])
    assert consecutive(folder).tolist() == before.tolist()
    save_interactions(folder, [event for event in EVENTS if event[2] == "train"])
    assert consecutive(folder).tolist() == before.tolist()


ROWS = np.array([[3, 4], [0, 2], [0, 0], [1, 0]], dtype=np.float32)


def test_similarity_uses_td_if_it_exists(folder):
    save_interactions(folder, EVENTS)
    save_embedding(folder, "image", np.ones((4, 1), dtype=np.float32))
    save_embedding(folder, "td", ROWS)
    reference = EvaluationData.load(folder, "image")
    assert reference.directions.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 1], [0, 0], [1, 0]]
    assert reference.pairs.tolist() == [[0, 1], [1, 2], [3, 2]]


def test_without_td_similarity_uses_the_quantized_embedding(folder):
    save_embedding(folder, "image", 2 * np.ones((4, 1), dtype=np.float32))
    reference = EvaluationData.load(folder, "image")
    assert reference.directions.tolist() == [[1], [1], [1], [1]]
    assert reference.pairs is None


def test_without_embeddings_only_pairs_are_loaded(folder):
    save_interactions(folder, EVENTS)
    reference = EvaluationData.load(folder, "image")
    assert reference.directions is None
    assert len(reference.pairs) == 3

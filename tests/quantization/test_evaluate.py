"""Figures of codes by hand."""

import math

import numpy as np
import pytest
import torch

from quantization.evaluate import bucket_sizes, code_figures, collision_rate, evaluate, perplexity


def test_collision_rate_counts_items_lacking_an_id_of_their_own():
    codes = np.array([[0, 1], [0, 1], [2, 3], [4, 5]])
    assert collision_rate(codes) == 0.25  # 4 items, 3 distinct IDs


def test_collision_rate_of_distinct_and_of_equal_codes():
    assert collision_rate(np.array([[0], [1], [2]])) == 0.0
    assert collision_rate(np.zeros((5, 2), dtype=int)) == pytest.approx(0.8)


def test_bucket_sizes_are_the_items_of_each_id():
    assert sorted(bucket_sizes(np.array([[1, 1], [0, 2], [1, 1], [1, 1], [0, 2], [5, 0]]))) == [1, 2, 3]


def test_perplexity_of_evenly_used_codes_is_their_number():
    assert perplexity(np.array([0, 7, 2, 5, 5, 2, 7, 0])) == pytest.approx(4.0)


def test_perplexity_of_one_code_is_one():
    assert perplexity(np.array([3, 3, 3])) == pytest.approx(1.0)


def test_perplexity_of_unevenly_used_codes():
    # Shares 1/2, 1/4, 1/4 have an entropy of 1.5 bits.
    assert perplexity(np.array([0, 0, 1, 2])) == pytest.approx(2**1.5)


def test_code_figures_by_hand():
    codes = np.array([[0, 0], [0, 0], [1, 3], [2, 3]])
    assert code_figures(codes, [4, 8]) == {
        "collision_rate": 0.25, "largest_bucket": 2, "utilization": [3 / 4, 2 / 8],
        "perplexity": [pytest.approx(2**1.5), pytest.approx(2.0)]}


def test_sizes_that_a_model_does_not_state_are_read_off_the_codes():
    assert code_figures(np.array([[0, 5], [3, 5]]), None)["utilization"] == [2 / 4, 1 / 6]


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_evaluation_weighs_a_short_last_batch_by_its_items(make_rqvae, xs, batch_size):
    model = make_rqvae().eval()
    with torch.no_grad():
        figures, codes = evaluate(model, xs, batch_size)
        whole = model.compute_loss(model(xs), xs)
    assert figures["loss_total"] == pytest.approx(whole["loss_total"].item(), rel=1e-5)
    assert figures["reconstruction_error"] == pytest.approx(whole["recon_loss"].item(), rel=1e-5)
    assert codes.tolist() == model.get_codes(xs).tolist()
    assert all(math.isfinite(value) for value in figures["perplexity"])

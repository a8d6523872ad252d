"""Item vectors from the training events, against dense linear algebra and brute-force counts."""

import logging
import tracemalloc

import numpy as np
import pytest

from common.artifacts import load_embeddings, load_mask, load_meta
from common.errors import ArtifactError, DataError
from dataloader.embeddings import collaborative
from dataloader.embeddings.collaborative import co_occurrence, item_vectors, leading_eigenpairs
from dataloader.flags import CONFIGS
from dataloader.fusion import fuse
from dataloader.options import Collaborative, Transform, load_section
from tests.dataloader.dataset import write_dataset
from tests.dataloader.helpers import mentions
from tests.errors import refused

NUM_ITEMS = 40


def shop_events(num_users: int = 120, num_items: int = NUM_ITEMS, seed: int = 0) -> list[tuple[int, int, int, str]]:
    """Histories of 4 to 9 events, mostly from one of four groups of items; leave-one-out."""
    rng = np.random.default_rng(seed)
    events = []
    for user in range(num_users):
        group = np.arange(user % 4, num_items, 4)
        length = int(rng.integers(4, 10))
        items = np.where(rng.random(length) < 0.9, rng.choice(group, length), rng.integers(num_items, size=length))
        splits = ["train"] * (length - 2) + ["valid", "test"]
        events += [(user, int(item), time, split) for time, (item, split) in enumerate(zip(items, splits, strict=True))]
    return events


def shop(tmp_path, events: list[tuple[int, int, int, str]], *flags: str, num_items: int = NUM_ITEMS):
    return write_dataset(tmp_path, [f"text {n}" for n in range(num_items)], "--suffix", "cf", *flags,
                         events=events).fusion


def defaults() -> Collaborative:
    return load_section(CONFIGS / "fusion.yaml", "cf", Collaborative)


def made(options) -> np.ndarray:
    fuse(options, "bash dataloader/5_fusion_embeddings.sh --suffix cf")
    return load_embeddings(options.folder, "cf")


def dense(events, num_items: int, smoothing: float) -> np.ndarray:
    """The normalized co-occurrence matrix, pair by pair, of all items."""
    counts, degrees = np.zeros((num_items, num_items)), np.zeros(num_items)
    for user in {event[0] for event in events}:
        basket = sorted({item for u, item, _, split in events if u == user and split == "train"})
        for one in basket:
            degrees[one] += len(basket) > 1
            for other in basket:
                if one != other:
                    counts[one, other] += 1 / (len(basket) - 1)
    degrees += smoothing * degrees[degrees > 0].mean()
    return counts / np.sqrt(np.outer(degrees, degrees))


@pytest.mark.parametrize("num_dims", [6, NUM_ITEMS], ids=["truncated", "more than there are"])
def test_the_vectors_are_those_of_a_dense_svd(tmp_path, num_dims):
    options, config = shop(tmp_path, shop_events()), defaults()
    config = config._replace(num_dims=num_dims, oversampling=6, max_products=400, tolerance=1e-7)
    vectors, present = item_vectors(options.folder, config, seed=0)
    assert present.all()
    left, values, right = np.linalg.svd(dense(shop_events(), NUM_ITEMS, config.smoothing))
    positive = np.einsum("ni,in->i", left, right) > 0  # else a singular value is that of a negative eigenvalue
    left, values = left[:, positive][:, :num_dims], values[positive][:num_dims]
    assert vectors.shape[1] == len(values)
    gram = (left * values) @ left.T * NUM_ITEMS / values.sum()
    np.testing.assert_allclose(vectors @ vectors.T, gram, atol=2e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=0) ** 2, values * NUM_ITEMS / values.sum(), rtol=1e-4)


def test_a_few_large_eigenvalues_do_not_drown_the_small_ones():
    # All users take about half of all items: the first eigenvalue is near 0.8, the others within 0.01 of zero.
    # A filter that stretched the block beyond what a float32 can hold would lose these.
    users, items = np.nonzero(np.random.default_rng(0).random((1000, 120)) < 0.5)
    config = defaults()._replace(num_dims=8, oversampling=6, max_products=400, tolerance=1e-5)
    matrix = co_occurrence(users, items, 0.3)
    values, _ = leading_eigenpairs(matrix, config, seed=0)
    exact = np.linalg.eigvalsh(matrix.times(np.eye(120, dtype=np.float32)).astype(np.float64))[::-1]
    assert exact[0] > 100 * np.abs(exact[1:8]).max()
    np.testing.assert_allclose(values[:8], exact[:8], atol=1e-5)


def test_the_mean_squared_length_is_1_and_signs_are_fixed(tmp_path):
    vectors = made(shop(tmp_path, shop_events()))
    assert np.mean((vectors ** 2).sum(axis=1)) == pytest.approx(1, abs=1e-4)
    assert (vectors.max(axis=0) == np.abs(vectors).max(axis=0)).all()


def without_test_events(events):
    return [event for event in events if event[3] == "train"]


def with_other_targets(events):
    return [(u, (i + 7) % NUM_ITEMS, t, s) if s != "train" else (u, i, t, s) for u, i, t, s in events]


def with_swapped_targets(events):
    """A user's last two events are valid and test; their items are exchanged."""
    items = [i for _, i, _, _ in events]
    for number, (_, _, _, split) in enumerate(events):
        if split == "test":
            items[number - 1], items[number] = items[number], items[number - 1]
    return [(u, i, t, s) for (u, _, t, s), i in zip(events, items, strict=True)]


def with_more_events(events):
    """Every second number is that of a new user without training events."""
    more = [(2 * u, i, t, s) for u, i, t, s in events]
    more += [(2 * n + 1, n % NUM_ITEMS, 0, ("valid", "test")[n % 2]) for n in range(120)]
    return sorted(more, key=lambda event: event[0])


@pytest.mark.parametrize("change", [without_test_events, with_other_targets, with_swapped_targets, with_more_events])
def test_valid_and_test_events_do_not_move_a_byte(tmp_path, change):
    files = []
    for name, events in (("one", shop_events()), ("other", change(shop_events()))):
        options = shop(tmp_path / name, events)
        made(options)
        files.append((options.folder.embeddings("cf").read_bytes(), options.folder.interactions.read_bytes()))
    assert files[0][0] == files[1][0]
    assert files[0][1] != files[1][1]


def test_a_training_event_moves_the_vectors(tmp_path):
    events = shop_events()
    first = next(n for n, event in enumerate(events) if event[3] == "train")
    user, item, *rest = events[first]
    other = [*events[:first], (user, (item + 1) % NUM_ITEMS, *rest), *events[first + 1:]]
    assert not np.array_equal(made(shop(tmp_path / "one", events)), made(shop(tmp_path / "other", other)))


def test_a_repeated_event_counts_once(tmp_path):
    events = shop_events()
    repeated = [(u, i, t, s) for u, i, t, s in events for _ in range(2 if s == "train" and u % 3 == 0 else 1)]
    np.testing.assert_array_equal(made(shop(tmp_path / "one", events)), made(shop(tmp_path / "other", repeated)))


def test_items_without_co_occurrence_are_masked_and_get_the_mean(tmp_path):
    users = max(user for user, *_ in shop_events()) + 1
    events = shop_events() + [(users, NUM_ITEMS, 0, "train"), (users, NUM_ITEMS, 1, "train"),  # with itself alone
                              (users, NUM_ITEMS + 1, 2, "valid"), (users, 0, 3, "test")]
    options = shop(tmp_path, events, num_items=NUM_ITEMS + 3)  # the last one is in no event
    vectors, present = made(options), load_mask(options.folder, "cf")
    np.testing.assert_array_equal(present, np.arange(NUM_ITEMS + 3) < NUM_ITEMS)
    np.testing.assert_allclose(vectors[~present], np.tile(vectors[present].mean(axis=0), (3, 1)), atol=1e-6)
    assert load_meta(options.folder.embeddings("cf"), "")["num_missing"] == 3


def test_a_group_beyond_the_dimensions_is_masked(tmp_path):
    # Two dimensions for three groups that share no user: those with more events per item take them.
    events = [(u, i, i, "train") for u in range(30) for i in range(3)]
    events += [(u, i, i, "train") for u in range(30, 50) for i in range(3, 6)]
    events += [(50, i, i, "train") for i in range(6, 9)]
    options, config = shop(tmp_path, events, num_items=9), defaults()._replace(num_dims=2)
    vectors, present = item_vectors(options.folder, config, seed=0)
    np.testing.assert_array_equal(present, np.arange(9) < 6)
    assert np.abs(vectors[0] @ vectors[3]) < 1e-3


def test_items_of_the_same_users_are_nearest(tmp_path):
    vectors = made(shop(tmp_path, shop_events()))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = unit @ unit.T - 2 * np.eye(NUM_ITEMS)
    assert np.mean(scores.argmax(axis=1) % 4 == np.arange(NUM_ITEMS) % 4) > 0.9


def test_a_catalogue_without_a_pair_is_refused(tmp_path):
    options = shop(tmp_path, [(user, user % NUM_ITEMS, time, "train") for user in range(50) for time in range(3)])
    with refused(DataError, options.folder.interactions, fix=["cf"]):
        made(options)
    assert not options.folder.embeddings("cf").exists()


def test_fewer_dimensions_are_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    vectors = made(shop(tmp_path, [(0, 0, 0, "train"), (0, 1, 1, "train"), (1, 1, 0, "train"), (1, 2, 1, "train")],
                        num_items=3))
    # Items 0 and 2 occur with item 1: a star, whose eigenvalues are one positive, its negative, and 0.
    assert vectors.shape == (3, 1)
    assert any(mentions(record.getMessage(), 1) for record in caplog.records if record.name == collaborative.log.name)


def test_the_artifact_records_its_inputs_and_becomes_stale(tmp_path):
    options = shop(tmp_path, shop_events())
    vectors, meta = made(options), load_meta(options.folder.embeddings("cf"), "")
    assert vectors.dtype == np.float32
    assert meta["inputs"] == {path.name: load_meta(path, "")["sha256"]
                              for path in (options.folder.items, options.folder.interactions)}
    assert (meta["settings"]["cf"], meta["settings"]["seed"]) == (defaults()._asdict(), 0)
    shop(tmp_path, shop_events(seed=1))
    with refused(ArtifactError, options.folder.embeddings("cf"), names=["interactions.parquet"],
                 fix=["bash dataloader/5_fusion_embeddings.sh --suffix cf --force"]):
        load_embeddings(options.folder, "cf")


def test_the_second_run_reuses_the_vectors_until_something_changes(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(collaborative, "item_vectors", lambda *args: runs.append(args) or item_vectors(*args))
    options = shop(tmp_path, shop_events())
    path = options.folder.embeddings("cf")
    first, before, time = made(options), path.read_bytes(), path.stat().st_mtime_ns
    made(options)
    assert (len(runs), path.stat().st_mtime_ns) == (1, time)
    made(options._replace(force=True))
    assert (len(runs), path.read_bytes()) == (2, before)
    made(options._replace(target=options.target._replace(transform=Transform(l2=True))))
    lengths = np.linalg.norm(load_embeddings(options.folder, "cf"), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
    made(shop(tmp_path, shop_events(seed=1)))
    assert len(runs) == 4
    assert not np.array_equal(load_embeddings(options.folder, "cf"), first)


def test_events_of_unknown_items_are_refused(tmp_path):
    options = shop(tmp_path, [(0, 0, 0, "train"), (0, 5, 1, "train")], num_items=3)
    with refused(ArtifactError, options.folder.interactions, fix=["bash dataloader/2_process.sh --force"]) as error:
        made(options)
    assert mentions(error.value.what, 1, "items.parquet")


def test_no_matrix_of_items_by_items_is_allocated():
    num_items = 20_000  # squared and in float32 they would take 1.6 GB
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(15_000, dtype=np.int32), 4)
    items = rng.integers(num_items, size=len(users), dtype=np.int32)
    config = defaults()._replace(num_dims=8, oversampling=8, max_products=16)
    tracemalloc.start()
    leading_eigenpairs(co_occurrence(users, items, config.smoothing), config, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6

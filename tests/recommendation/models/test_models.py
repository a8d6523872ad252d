"""The contract of every recommender, and how recommenders are found."""

import pytest
import torch
import yaml

from common.cli import ROOT
from common.config import resolve
from common.data_parallel import WHOLE
from common.errors import ConfigError
from recommendation import models
from recommendation.batches import TrainingBatches
from recommendation.models import DEFAULTS, config_path, find_class, names
from recommendation.models.abstract_model import AbstractRecommender, Catalogue, HeldOut, Recommendations
from tests.brute_force import best_unseen
from tests.errors import refused

from ..conftest import LOSSES, NUM_ITEMS, SIZES, padded, random_codes, windows_of

HISTORIES = [[3, 8, 0, 29, 11], [0], [5, 21]]


@pytest.fixture(params=names())
def recommender(request, make_model):
    return make_model(request.param)


@pytest.mark.parametrize("name", names())
def test_a_model_without_gradients_declares_the_parameters_it_uses(name):
    config = resolve(name, config_path(name), DEFAULTS, [])
    assert find_class(name).trained_by_gradient() == (config.rules.uses is None)


def first_batch(recommender, sequences):
    return TrainingBatches(sequences, recommender.training_unit, 16, 5, seed=0).get(0, 0, WHOLE)


@pytest.fixture
def ready(recommender, sequences):
    return made_ready(recommender, sequences)


def made_ready(recommender, sequences):
    """The model after fit, or after one training step."""
    if not recommender.fit(sequences.training_sequences(), sequences.validation_events()):
        optimizer = torch.optim.AdamW(recommender.parameters(), lr=0.01)
        recommender.compute_loss(first_batch(recommender, sequences))["loss_total"].backward()
        optimizer.step()
    return recommender.eval()


def test_a_step_has_finite_losses_and_all_gradients(recommender, sequences):
    if recommender.fit(sequences.training_sequences(), sequences.validation_events()):
        pytest.skip("fits in one call")
    losses = recommender.train().compute_loss(first_batch(recommender, sequences))
    losses["loss_total"].backward()
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    for name, parameter in recommender.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_recommendations_are_items_best_first(ready):
    result = ready.recommend(windows_of(*HISTORIES), 20)
    assert result.items.shape == result.scores.shape == (3, 20)
    assert ((result.items >= 0) & (result.items < NUM_ITEMS)).all()
    assert (result.scores.diff(dim=1) <= 0).all()
    assert all(len(row.unique()) == 20 for row in result.items)


@torch.no_grad()
def test_recommendations_are_reproducible_and_independent_of_the_batch(ready):
    together = ready.recommend(windows_of(*HISTORIES), 20)
    again = ready.recommend(windows_of(*HISTORIES), 20)
    assert torch.equal(together.items, again.items)
    assert torch.equal(together.scores, again.scores)
    for row, history in enumerate(HISTORIES):
        alone = ready.recommend(windows_of(history), 20)
        assert torch.equal(alone.items[0], together.items[row])
        assert torch.allclose(alone.scores[0], together.scores[row], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "normalize_over"), LOSSES)
def test_unseen_items_are_the_best_without_the_seen(make_model, sequences, catalogue, name, normalize_over):
    recommender = made_ready(make_model(name, normalize_over=normalize_over), sequences)
    recommender.num_beams = NUM_ITEMS  # makes a beam search exact
    same_prefix = (catalogue.codes[:, 0] == catalogue.codes[0, 0]).nonzero()[:, 0].tolist()
    everything = list(range(NUM_ITEMS))
    seen = [HISTORIES[0], [], same_prefix, everything, everything[:-1], everything[:NUM_ITEMS // 2]]
    histories = windows_of(*HISTORIES, *HISTORIES)
    with torch.no_grad():
        full = recommender.recommend(histories, NUM_ITEMS)
        result = recommender.recommend_unseen(histories, padded(*seen), 12)
    assert result.items.shape == result.scores.shape == (6, 12)
    for row, of_row in enumerate(seen):
        scores = dict(zip(full.items[row].tolist(), full.scores[row].tolist(), strict=True))
        items, expected = best_unseen(scores, of_row, 12)
        assert result.items[row].tolist() == items
        assert result.scores[row].tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("parent", ["sasrec", "decoder_only", "popularity"])
def test_a_subclass_that_overrides_recommend_filters_its_own_lists(make_model, parent):
    class Backwards(find_class(parent)):
        """Recommends the items from the last to the first."""

        def recommend(self, histories, top_k):
            items = torch.arange(NUM_ITEMS - 1, NUM_ITEMS - 1 - top_k, -1)
            return Recommendations(items.expand(len(histories.items), -1), items.expand(len(histories.items), -1))

    model = make_model(parent)
    model.__class__ = Backwards
    result = model.recommend_unseen(windows_of([3], [4], [5]), padded([29, 27], [], [0, 28, 1, 26, 2]), 3)
    assert result.items.tolist() == [[28, 26, 25], [29, 28, 27], [29, 27, 25]]


@torch.no_grad()
def test_lists_longer_than_the_catalogue_are_padded(make_model):
    few = Catalogue(6, random_codes(6, SIZES), SIZES)
    for name in names():
        recommender = make_model(name, of=few)
        recommender.fit([torch.tensor([0, 1, 2]), torch.tensor([0, 3])],
                        HeldOut(torch.tensor([0, 1, 2, 3]), torch.tensor([0]), torch.tensor([3])))
        result = recommender.eval().recommend(windows_of([0, 5], [1]), 20)
        for items, scores in zip(result.items.tolist(), result.scores.tolist(), strict=True):
            assert sorted(items[:6]) == list(range(6)), name
            assert items[6:] == [-1] * 14, name
            assert scores[6:] == [float("-inf")] * 14, name


@pytest.mark.parametrize("name", names())
def test_every_model_parameter_of_the_yaml_is_read(name, make_config, catalogue):
    config = make_config(name)
    model_config = config.for_model()
    find_class(name)(model_config, catalogue)
    config.check_all_read(model_config)


@pytest.mark.parametrize("name", names())
def test_every_yaml_has_its_class_and_its_own_command(name):
    model_class = find_class(name)
    assert issubclass(model_class, AbstractRecommender)
    assert model_class.__name__.lower() == name.replace("_", "")
    for line in config_path(name).read_text(encoding="utf-8").splitlines()[:1]:
        assert not line.startswith("# python ") or line.startswith(f"# python recommendation/main.py --model={name}")


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with refused(ConfigError, "--model encoder-decoder", names=["'encoder_decoder'"], fix=["--model encoder_decoder"]):
        config_path("encoder-decoder")


def test_a_model_without_fit_and_loss_raises():
    class Lazy(AbstractRecommender):
        def recommend(self, histories, top_k):
            raise NotImplementedError

    lazy = Lazy({}, Catalogue(3, None, []))
    assert not lazy.fit([], None)
    with pytest.raises(TypeError, match="Lazy"):
        lazy.compute_loss(windows_of([0, 1]))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder that replaces recommendation/models."""
    monkeypatch.setattr(models, "MODELS", tmp_path)
    monkeypatch.setattr(models, "__path__", [str(tmp_path), *models.__path__])
    return tmp_path


def add(home, name: str, source: str) -> None:
    (home / name).mkdir()
    (home / name / "model.py").write_text(source)
    (home / name / "config.yaml").write_text(f"{name}:\n")


def test_a_recommender_is_added_by_its_folder(home):
    add(home, "my_model_a", "from ..abstract_model import AbstractRecommender\n"
                            "class MyModelA(AbstractRecommender):\n    pass\n")
    assert names() == ["my_model_a"]
    assert config_path("my_model_a") == home / "my_model_a" / "config.yaml"
    assert find_class("my_model_a").__name__ == "MyModelA"


def test_a_yaml_without_its_model_file_is_refused(home):
    with refused(ConfigError, home / "my_model_b" / "model.py", names=["'my_model_b'"]):
        find_class("my_model_b")


@pytest.mark.parametrize(("number", "source"), [
    (1, "class Other:\n    pass\n"), (2, "class MyModelC2:\n    pass\n"), (3, "my_model_c3 = 1\n")])
def test_a_model_file_without_its_class_is_refused(home, number, source):
    name = f"my_model_c{number}"
    add(home, name, source)
    with refused(ConfigError, home / name / "model.py", fix=[f"'{name}'", "AbstractRecommender"]):
        find_class(name)


RECIPES = sorted(models.MODELS.glob("*/recipes/*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_every_recipe_builds_its_model_and_has_its_command(path, catalogue):
    name = path.parent.parent.name
    config = resolve(name, path, DEFAULTS, [])
    model_config = config.for_model()
    find_class(name)(model_config, catalogue)
    config.check_all_read(model_config)
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith(f"# python recommendation/main.py --model={name} ")
    assert f"--config {path.relative_to(ROOT)}" in second


@pytest.mark.parametrize(("name", "key", "value"), [
    ("encoder_decoder", "num_beams", 0), ("encoder_decoder", "num_beams", "many"), ("encoder_decoder", "d_kv", -4),
    ("encoder_decoder", "dropout", 1.5), ("encoder_decoder", "max_distance", 4), ("encoder_decoder", "num_buckets", 2),
    ("encoder_decoder", "train_on", "everything"), ("decoder_only", "num_heads", 0), ("decoder_only", "dropout", -0.5),
    ("decoder_only", "num_layers", 2.5), ("decoder_only", "scoring", "exct"), ("encoder_retrieve", "temperature", 0),
    ("encoder_retrieve", "num_hops", 0), ("encoder_retrieve", "dropout", "null"), ("sasrec", "d_model", "wide"),
    ("sasrec", "num_layers", -1), ("sasrec", "num_heads", "true"),
    ("sasrec", "num_heads", 32), ("encoder_retrieve", "num_heads", 3),
])
def test_a_value_that_a_model_cannot_use_is_refused(make_model, name, key, value):
    with refused(ConfigError, names=[f"{name}.model_params.{key}", repr(yaml.safe_load(str(value)))]):
        make_model(name, **{key: value})


@pytest.mark.parametrize(("name", "key", "value"), [
    ("encoder_decoder", "num_encoder_layers", 10_000_000), ("encoder_decoder", "d_kv", 99999999999999999999),
    ("encoder_decoder", "d_model", 10**9), ("decoder_only", "num_beams", 10**9), ("sasrec", "d_ff", 10**9),
    ("encoder_retrieve", "num_hops", 10**9), ("markov", "top_k", 10**9)])
def test_an_absurd_size_is_refused_at_once(make_config, name, key, value):
    with refused(ConfigError, f"--{name}.{'training' if key == 'top_k' else 'model'}_params.{key}"):
        make_config(name, **{key: value})

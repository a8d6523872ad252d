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
from recommendation.decoding.top_k import Prior
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


class OnlyRecommends(AbstractRecommender):
    """Recommends the even items, the smallest first."""

    needs_codes = False

    def recommend(self, histories, top_k):
        items = torch.arange(0, 2 * top_k, 2)
        items = items.masked_fill(items >= self.catalogue.num_items, -1).expand(len(histories.items), -1)
        return Recommendations(items, (-items.double()).masked_fill(items == -1, float("-inf")))


class OnlyScores(AbstractRecommender):
    """Scores an item by its distance from the last item of the history."""

    needs_codes = False

    def score_items(self, histories):
        last = histories.items.gather(1, histories.lengths.unsqueeze(1) - 1)
        return -(torch.arange(self.catalogue.num_items) - last).abs().double()


SIX = Catalogue(6, None, [])


def test_the_scores_of_a_model_that_only_recommends_are_those_of_its_lists():
    low = float("-inf")
    assert OnlyRecommends({}, SIX).score_items(windows_of([3], [4, 5])).tolist() == [[0, low, -2, low, -4, low]] * 2


def test_the_lists_of_a_model_that_only_scores_have_the_best_scores():
    model, histories = OnlyScores({}, SIX), windows_of([3], [5, 0])
    items, scores = model.recommend(histories, 4)
    assert items.tolist() == [[3, 2, 4, 1], [0, 1, 2, 3]]
    assert scores.tolist() == [[0, -1, -1, -2], [0, -1, -2, -3]]
    assert model.recommend_unseen(histories, padded([3, 4], [0]), 4).items.tolist() == [[2, 1, 5, 0], [1, 2, 3, 4]]


def test_a_prior_is_added_to_the_scores_of_either_kind():
    log_p = torch.tensor([-6.0, -5.0, -4.0, -3.0, -2.0, -1.0]).double().repeat(2, 1)
    prior = Prior(log_p, torch.tensor([[0.0], [4.0]]).double())
    histories = windows_of([3], [3])
    # With the weight 4, the scores of the items 0, 2 and 4 are 0 - 24, -2 - 16 and -4 - 8.
    items, scores = OnlyRecommends({}, SIX).recommend_with_prior(histories, prior, None, 4)
    assert items[:, :3].tolist() == [[0, 2, 4], [4, 2, 0]]
    assert scores[:, :3].tolist() == [[0, -2, -4], [-12, -18, -24]]
    assert (scores[:, 3] == float("-inf")).all()
    assert OnlyScores({}, SIX).recommend_with_prior(histories, prior, padded([3], [5, 0]), 2).items.tolist() == [
        [2, 4], [4, 3]]


def test_a_model_without_scores_and_lists_is_refused_by_name():
    class Silent(AbstractRecommender):
        needs_codes = False

    for call in (lambda: Silent({}, SIX).recommend(windows_of([0]), 2),
                 lambda: Silent({}, SIX).score_items(windows_of([0]))):
        with pytest.raises(TypeError, match="Silent.*score_items.*recommend"):
            call()


@torch.no_grad()
@pytest.mark.parametrize("parent", ["sasrec", "decoder_only", "encoder_retrieve", "popularity"])
def test_a_subclass_that_overrides_one_method_has_the_defaults_of_the_others(make_model, parent):
    class Recommends(find_class(parent)):
        recommend = OnlyRecommends.recommend

    class Scores(find_class(parent)):
        score_items = OnlyScores.score_items

    histories, seen = windows_of([3], [5]), padded([0], [3, 4])
    prior = Prior(torch.zeros(2, NUM_ITEMS), torch.ones(2, 1))
    for other, plain in ((Recommends, OnlyRecommends), (Scores, OnlyScores)):
        model, expected = make_model(parent).eval(), plain({}, Catalogue(NUM_ITEMS, None, []))
        model.__class__ = other
        assert torch.equal(model.score_items(histories), expected.score_items(histories))
        for method, args in (("recommend", (3,)), ("recommend_unseen", (seen, 3)),
                             ("recommend_with_prior", (prior, None, 3)), ("recommend_with_prior", (prior, seen, 3))):
            ours, theirs = (getattr(of, method)(histories, *args) for of in (model, expected))
            assert ours.items.tolist() == theirs.items.tolist(), method
            assert torch.allclose(ours.scores.double(), theirs.scores.double()), method


@pytest.mark.slow
@pytest.mark.parametrize(("name", "normalize_over"), LOSSES)
def test_the_scores_of_all_items_are_those_of_the_longest_lists(make_model, sequences, name, normalize_over):
    model = made_ready(make_model(name, normalize_over=normalize_over, num_beams=NUM_ITEMS), sequences)
    histories = windows_of(*HISTORIES)
    with torch.no_grad():
        scores, full = model.score_items(histories), model.recommend(histories, NUM_ITEMS)
    assert scores.shape == (3, NUM_ITEMS)
    assert torch.allclose(scores.gather(1, full.items), full.scores, atol=1e-5)
    if model.trained_by_gradient() and name not in ("sasrec", "gru4rec"):  # log-probabilities
        assert (scores.logsumexp(dim=1) < 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("with_seen", [False, True])
@pytest.mark.parametrize(("name", "normalize_over"), LOSSES)
def test_a_prior_gives_the_lists_of_the_added_scores(make_model, sequences, catalogue, name, normalize_over, with_seen):
    model = made_ready(make_model(name, normalize_over=normalize_over, num_beams=NUM_ITEMS), sequences)
    histories = windows_of(*HISTORIES, *HISTORIES)
    same_prefix = (catalogue.codes[:, 0] == catalogue.codes[0, 0]).nonzero()[:, 0].tolist()
    seen = [HISTORIES[0], [], same_prefix, [*range(NUM_ITEMS)], [*range(NUM_ITEMS - 1)], same_prefix[:-1]]
    weights = [0.0, 0.1, 1.0, 2.5, 8.0, 0.4]
    generator = torch.Generator().manual_seed(0)
    log_p = (5 * torch.randn(6, NUM_ITEMS, generator=generator)).log_softmax(dim=1)
    with torch.no_grad():
        plain = model.score_items(histories)
        prior = Prior(log_p.to(plain), torch.tensor(weights).unsqueeze(1).to(plain))
        result = model.recommend_with_prior(histories, prior, padded(*seen) if with_seen else None, 12)
        alone = model.recommend_unseen(histories, padded(*seen), 12) if with_seen else model.recommend(histories, 12)
    for row, of_row in enumerate(seen):
        scores = dict(enumerate((plain[row].double() + weights[row] * log_p[row].double()).tolist()))
        items, expected = best_unseen(scores, of_row if with_seen else [], 12)
        assert result.items[row].tolist() == items
        assert result.scores[row].tolist() == pytest.approx(expected, abs=1e-4)
    assert result.items[0].tolist() == alone.items[0].tolist()  # the weight 0


@torch.no_grad()
@pytest.mark.parametrize("with_seen", [False, True])
def test_a_walk_through_all_items_with_a_prior_is_exact(make_model, with_seen):
    exact, graph = (make_model("encoder_retrieve", scoring=scoring, normalize_over="codebook", num_beams=NUM_ITEMS,
                               num_neighbours=NUM_ITEMS).eval() for scoring in ("exact", "graph"))
    graph.prepare()
    assert graph.graph is not None
    log_p = torch.randn(3, NUM_ITEMS, generator=torch.Generator().manual_seed(0)).log_softmax(dim=1)
    prior, seen = Prior(log_p, torch.tensor([[0.0], [1.0], [8.0]])), padded([3, 8], [], [*range(NUM_ITEMS - 3)])
    ours, theirs = (model.recommend_with_prior(windows_of(*HISTORIES), prior, seen if with_seen else None, 12)
                    for model in (graph, exact))
    assert torch.equal(ours.items, theirs.items)
    assert torch.allclose(ours.scores, theirs.scores, atol=1e-5)


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

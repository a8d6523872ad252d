"""The contract of every quantizer, and the lookup of its files."""

import copy

import pytest
import torch
from torch import Tensor

from common.config import resolve
from common.errors import ConfigError
from quantization import models
from quantization.models import CONFIGS, config_path, find_class, names
from quantization.models.abstract_vq import AbstractVQ
from quantization.utils import check_contract, checked_codes
from tests.errors import refused
from tests.quantization.conftest import DOCUMENTED, WIDTH, numbers, seeded, shown

MANY = 240
KINDS = ("distinct", "repeated", "constant")


def items_for(model: AbstractVQ, kind: str) -> Tensor:
    """Items with the columns of all embeddings of the quantizer; some lack the second embedding."""
    suffixes = model.embedding_suffixes(model.config, "td")
    if not suffixes:
        return torch.arange(MANY).unsqueeze(1)
    xs = torch.randn(MANY, WIDTH * len(suffixes), generator=seeded(3))
    xs[::5, WIDTH:] = 0.0
    if kind == "repeated":
        xs = xs[(torch.arange(MANY) % 40).clamp(max=9)]  # ten different rows, fewer than codewords; one 186 times
    return xs[1].expand_as(xs).clone() if kind == "constant" else xs


def is_documented(model: AbstractVQ) -> bool:
    """Whether docs/semantic_ids.md lists the quantizer; the file of its class has its name."""
    return type(model).__module__.rpartition(".")[2] in DOCUMENTED


@pytest.fixture(scope="module", params=[(name, kind) for name in names() for kind in KINDS], ids="-".join)
def ready(request, make_config, make_model):
    """A quantizer, fitted or initialized, and its items; a test must copy it before a change."""
    name, kind = request.param
    model = make_model(make_config(name, codebook_size=16), MANY)
    items = items_for(model, kind)
    if model.fit(items, seeded()):
        assert name not in DOCUMENTED or not list(model.parameters())
    else:
        model.initialize(items, seeded())
    return model.eval(), items


@pytest.mark.parametrize("name", names())
def test_a_fitted_quantizer_declares_its_training_keys(name):
    config = resolve(name, config_path(name), CONFIGS / "defaults.yaml", [])
    assert find_class(name).trained_by_gradient() or config.rules.uses == set()


@pytest.mark.slow
def test_one_training_step_is_finite_and_reaches_every_parameter(ready):
    model, items = copy.deepcopy(ready[0]).train(), ready[1]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    losses = model.compute_loss(model(items), items)
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert losses["loss_total"].requires_grad == bool(trained)
    # A model without trained parameters is fitted, or `forward` updates its averages.
    assert trained or type(model).fit is not AbstractVQ.fit or any(
        not torch.equal(state[name], value) for name, value in model.state_dict().items())
    if trained:
        losses["loss_total"].backward()
        torch.optim.Adam(trained.values(), lr=0.01).step()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert len(checked_codes(model.eval(), items)) == MANY


@pytest.mark.slow
def test_maintenance_between_epochs_keeps_the_contract(ready):
    model, items = copy.deepcopy(ready[0]), ready[1]
    model.end_epoch(items, seeded())
    model.maintain(items, seeded())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    check_contract(model, items)


def test_forward_returns_reconstruction_loss_and_codes(ready):
    model, items = ready
    with torch.no_grad():
        reconstruction, loss, codes = model(items)
    assert reconstruction.shape == model.target(items).shape
    assert reconstruction.isfinite().all()
    assert loss.shape == ()
    assert loss.isfinite()
    assert codes.shape == model.get_codes(items).shape
    # If a codeword equals an item, the residual is rounding noise: float32 and float64 code it differently.
    if len(items.unique(dim=0)) == MANY:
        assert (codes == model.get_codes(items)).float().mean() > 0.95


def test_codes_lie_in_their_codebooks(ready):
    model, items = ready
    codes = checked_codes(model, items)
    assert len(codes) == MANY
    assert (codes >= 0).all()
    if is_documented(model):
        assert model.get_codes(items).dtype == torch.int64
        assert model.get_codes(items).shape == (MANY, len(model.codebook_sizes))
        assert (codes < torch.tensor(model.codebook_sizes)).all()


@pytest.mark.slow
def test_codes_do_not_depend_on_the_batch_or_order(ready):
    model, items = ready
    check_contract(model, items)
    if not is_documented(model):  # in float32 a few items may get other codes in another batch
        return
    together, order = model.get_codes(items), torch.randperm(MANY, generator=seeded(1))
    assert torch.equal(together, model.get_codes(items))
    assert torch.equal(together, torch.cat([model.get_codes(batch) for batch in items.split(77)]))
    assert torch.equal(together[::5], torch.cat([model.get_codes(item) for item in items[::5].split(1)]))
    assert torch.equal(together[order], model.get_codes(items[order]))
    same, number = torch.unique(items, dim=0, return_inverse=True)
    assert len(torch.unique(torch.cat([number.unsqueeze(1), together], dim=1), dim=0)) == len(same)


def test_a_saved_quantizer_has_the_same_codes(ready):
    model, items = ready
    other, saved = copy.deepcopy(model), {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    other.load_state_dict(saved)
    assert torch.equal(model.get_codes(items), other.get_codes(items))


def test_the_last_code_has_the_smallest_last_distance(ready):
    model, items = ready
    distances = model.last_distances(items)
    if distances is None:
        return
    assert distances.shape[0] == MANY
    assert model.codebook_sizes is None or distances.shape[1] == model.codebook_sizes[-1]
    assert distances.isfinite().all()
    chosen = distances.gather(1, checked_codes(model, items)[:, -1:])
    assert torch.allclose(chosen, distances.amin(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("name", names())
def test_a_training_step_moves_every_parameter(name, make_config, make_model):
    model = make_model(make_config(name, codebook_size=16), MANY)
    items = items_for(model, "distinct")
    if not any(p.requires_grad for p in model.parameters()):
        return
    model.initialize(items, seeded())
    trained = {name: (p, p.detach().clone()) for name, p in model.named_parameters() if p.requires_grad}
    model.compute_loss(model(items), items)["loss_total"].backward()
    torch.optim.Adam(model.parameters(), lr=0.01).step()
    for name, (parameter, before) in trained.items():
        assert not torch.equal(before, parameter), name


OPTIONS = [{"start": "random"}, {"update": "ema"}, {"distance": "cosine"}, {"distance": "cosine", "update": "ema"},
           {"gradient": "rotation"}, {"gradient": "gumbel"}, {"gradient": "gumbel", "distance": "cosine"},
           {"restart_dead": "false"}, {"sinkhorn_levels": "[0, -1]"}, {"sinkhorn_levels": "[0]", "update": "ema"}]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize("name", ["rqvae", "rvq"])
def test_every_option_of_the_codebooks_trains_and_codes(name, options, zero, make_config, make_model):
    options = {"update": "gradient", "num_levels": 2, "kmeans_iterations": 2} | options
    model = make_model(make_config(name, codebook_size=16, **options), MANY)
    items = torch.zeros(MANY, WIDTH) if zero else items_for(model, "repeated")
    model.initialize(items, seeded())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(2):
        model.train()
        for batch in items.split(MANY // 2):
            losses = model.compute_loss(model(batch), batch)
            if losses["loss_total"].requires_grad:
                optimizer.zero_grad()
                losses["loss_total"].backward()
                optimizer.step()
            assert all(loss.isfinite() for loss in losses.values())
        model.maintain(items, seeded(epoch))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    check_contract(model, items)


@pytest.mark.parametrize("name", names())
def test_every_model_parameter_of_the_yaml_is_read(name, make_config, make_model):
    config = make_config(name)
    config.check_all_read(make_model(config).config)


WITH = {key: [name for name in DOCUMENTED if key in resolve(name, config_path(name), CONFIGS / "defaults.yaml", [])
              [name]["model_params"]] for key in ("num_levels", "codebook_size", "latent_size", "codebook")}


def with_key(key: str) -> pytest.MarkDecorator:
    """Parametrize over the documented quantizers whose YAML has the key."""
    return pytest.mark.parametrize("name", WITH[key])


@with_key("codebook_size")
def test_a_codebook_larger_than_the_catalogue_is_refused(name, make_config, make_model):
    with refused(ConfigError, f"{name}.model_params.codebook_size", names=[41, 40], fix=["--codebook_size auto"]):
        make_model(make_config(name, codebook_size=41))


@with_key("codebook_size")
@pytest.mark.parametrize("size", [0, "many", "true"])
def test_an_invalid_codebook_size_is_refused(name, size, make_config, make_model):
    with refused(ConfigError, f"{name}.model_params.codebook_size", names=[shown(size)], fix=["--codebook_size auto"]):
        make_model(make_config(name, codebook_size=size))


@with_key("num_levels")
@pytest.mark.parametrize("value", [0, "true", "x", 1_000_000])
def test_an_invalid_number_of_levels_is_refused(name, value, make_config, make_model):
    with refused(ConfigError, names=[f"{name}.model_params.num_levels", shown(value)]):
        make_model(make_config(name, num_levels=value))


@with_key("latent_size")
@pytest.mark.parametrize("value", [0, "many"])
def test_an_invalid_latent_size_is_refused(name, value, make_config, make_model):
    with refused(ConfigError, names=[f"{name}.model_params.latent_size", shown(value)]):
        make_model(make_config(name, latent_size=value))


@with_key("latent_size")
@pytest.mark.parametrize("value", ["[8, 0]", "[many]", "8", "null", "[1000000000]"])
def test_invalid_hidden_sizes_are_refused(name, value, make_config, make_model):
    with refused(ConfigError, f"{name}.model_params.hidden_sizes", names=[shown(value)], fix=["--hidden_sizes ["]):
        make_model(make_config(name, hidden_sizes=value))


@with_key("codebook")
def test_sinkhorn_levels_that_do_not_exist_are_refused(name, make_config, make_model):
    config = make_config(name, sinkhorn_levels="[3]")
    num_levels = config[name]["model_params"].get("num_levels", 1)
    with refused(ConfigError, f"{name}.model_params.codebook.sinkhorn_levels", names=[3, num_levels]):
        make_model(config)


@with_key("codebook")
def test_gumbel_cannot_be_combined_with_moving_averages(name, make_config, make_model):
    with refused(ConfigError, f"{name}.model_params.codebook.update", names=["ema", "gumbel"],
                 fix=["--update gradient", "--gradient straight_through"]):
        make_model(make_config(name, update="ema", gradient="gumbel"))


@with_key("codebook")
@pytest.mark.parametrize("key", ["sinkhorn_epsilon", "gumbel_temperature"])
def test_a_temperature_of_zero_is_refused(name, key, make_config, make_model):
    with refused(ConfigError, f"{name}.model_params.codebook.{key}", names=["0.0"]):
        make_model(make_config(name, **{key: 0.0}))


@pytest.mark.parametrize("name", ["rqvae", "rvq"])
@pytest.mark.parametrize(("key", "value", "valid"), [
    ("start", "kmean", ["'kmeans'"]), ("update", "emma", ["'ema'"]), ("distance", "cosin", ["'cosine'"]),
    ("gradient", "rotated", ["'rotation'"]), ("restart_dead", "maybe", [])])
def test_a_wrong_codebook_option_is_refused(name, key, value, valid):
    path = f"{name}.model_params.codebook.{key}"
    with refused(ConfigError, f"--{path}", names=[path, repr(value), *valid]):
        resolve(name, config_path(name), CONFIGS / "defaults.yaml", [(path, value)])


@pytest.mark.parametrize("name", ["rqvae", "rvq"])
@pytest.mark.parametrize(("key", "value", "bounds"), [
    ("ema_decay", "1.5", {"0", "1"}), ("kmeans_iterations", "0", {"1"}), ("sinkhorn_iterations", "0", {"1"})])
def test_a_codebook_option_out_of_bounds_is_refused(name, key, value, bounds):
    path = f"{name}.model_params.codebook.{key}"
    with refused(ConfigError, f"--{path}", names=[path]) as raised:
        resolve(name, config_path(name), CONFIGS / "defaults.yaml", [(path, value)])
    assert {value, *bounds} <= set(numbers(str(raised.value)))


@with_key("codebook")
def test_an_unknown_yaml_key_is_refused_with_a_suggestion(name, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"{name}:\n  model_params:\n    codebook:\n      restart_ded: true\n")
    with refused(ConfigError, f"{path}:4", names=["restart_ded", "'restart_dead'"]):
        resolve(name, path, CONFIGS / "defaults.yaml", [])


def test_an_unknown_flag_is_refused_with_a_suggestion():
    with refused(ConfigError, "--restart_ded", names=["'restart_dead'"], fix=["--help"]):
        resolve("rqvae", config_path("rqvae"), CONFIGS / "defaults.yaml", [("restart_ded", "true")])


@pytest.mark.parametrize("name", names())
def test_every_yaml_has_its_class(name):
    model_class = find_class(name)
    assert issubclass(model_class, AbstractVQ)
    assert model_class.__name__.replace("_", "").lower() == name.replace("_", "")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_yaml_opens_with_its_command(name):
    assert config_path(name).read_text().startswith(f"# python quantization/main.py --quantizer_name {name}")


def test_an_unknown_quantizer_is_refused_with_a_suggestion():
    with refused(ConfigError, "--quantizer_name rqave", names=["'rqvae'"], fix=["--quantizer_name rqvae"]):
        config_path("rqave")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder that replaces quantization/models and quantization/configs."""
    monkeypatch.setattr(models, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(models, "__path__", [str(tmp_path), *models.__path__])
    monkeypatch.setattr(models, "CONFIGS", tmp_path)
    return tmp_path


def test_a_quantizer_is_added_by_its_two_files(home):
    (home / "my_vq_a.py").write_text("from .abstract_vq import AbstractVQ\nclass MyVQ_A(AbstractVQ):\n    pass\n")
    (home / "my_vq_a_config.yaml").write_text("my_vq_a:\n")
    assert names() == ["my_vq_a"]
    assert config_path("my_vq_a") == home / "my_vq_a_config.yaml"
    assert find_class("my_vq_a").__name__ == "MyVQ_A"


def test_a_yaml_without_its_model_file_is_refused(home):
    with refused(ConfigError, home / "my_vq_b.py", names=["'my_vq_b'"]):
        find_class("my_vq_b")


@pytest.mark.parametrize(("number", "source"), [
    (1, "class Other:\n    pass\n"),
    (2, "class MyVQC2:\n    pass\n"),
    (3, "my_vq_c3 = 1\n"),
])
def test_a_model_file_without_its_class_is_refused(home, number, source):
    (home / f"my_vq_c{number}.py").write_text(source)
    with refused(ConfigError, home / f"my_vq_c{number}.py", names=["AbstractVQ"], fix=[f"my_vq_c{number}"]):
        find_class(f"my_vq_c{number}")

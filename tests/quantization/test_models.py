"""What every quantizer promises, and how it is found."""

import pytest
import torch

from common.errors import ConfigError
from quantization import models
from quantization.models import config_path, find_class, names
from quantization.models.abstract_vq import AbstractVQ
from quantization.utils import checked_codes

from .conftest import NUM_ITEMS, WIDTH


@pytest.fixture(params=names())
def quantizer(request, make_config, make_model):
    return make_model(make_config(request.param))


@pytest.fixture
def items(quantizer) -> torch.Tensor:
    """As many columns as the quantizer's embeddings have together."""
    num_inputs = len(quantizer.embedding_suffixes(quantizer.config, "td"))
    return torch.randn(NUM_ITEMS, WIDTH * num_inputs, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def ready(quantizer, items):
    """The quantizer fitted, or started from the data."""
    generator = torch.Generator().manual_seed(0)
    if not quantizer.fit(items, generator):
        quantizer.initialize(items, generator)
    return quantizer.eval()


def test_one_step_has_a_finite_loss_and_moves_every_parameter(quantizer, items):
    generator = torch.Generator().manual_seed(0)
    if quantizer.fit(items, generator):
        pytest.skip("fits in one call")
    quantizer.initialize(items, generator)
    quantizer.train()
    before = {name: p.detach().clone() for name, p in quantizer.named_parameters()}
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    losses = quantizer.compute_loss(quantizer(items), items)
    losses["loss_total"].backward()
    optimizer.step()
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert not torch.equal(before[name], parameter), name


def test_forward_returns_reconstruction_loss_and_codes(ready, items):
    with torch.no_grad():
        reconstruction, loss, codes = ready(items)
    assert reconstruction.shape == items.shape
    assert loss.shape == ()
    assert torch.equal(codes.reshape(NUM_ITEMS, -1), checked_codes(ready, items))


def test_codes_lie_in_their_codebooks(ready, items):
    codes = checked_codes(ready, items)
    assert len(codes) == NUM_ITEMS
    assert (codes >= 0).all()
    if ready.codebook_sizes is not None:
        assert len(ready.codebook_sizes) == codes.shape[1]
        assert (codes < torch.tensor(ready.codebook_sizes)).all()


def test_an_item_has_the_same_codes_whenever_and_with_whomever_it_is_asked(ready, items):
    together = checked_codes(ready, items)
    assert torch.equal(together, checked_codes(ready, items))
    assert torch.equal(together, torch.cat([checked_codes(ready, item) for item in items.split(1)]))


def test_the_care_between_epochs_leaves_a_working_model(ready, items):
    ready.end_epoch(items, torch.Generator().manual_seed(0))
    assert all(p.isfinite().all() for p in ready.parameters())
    assert checked_codes(ready, items).shape[0] == NUM_ITEMS


@pytest.mark.parametrize("name", names())
def test_every_model_parameter_of_the_yaml_is_read(name, make_config):
    config = make_config(name)
    model_class = find_class(name)
    inputs = dict.fromkeys(model_class.embedding_suffixes(config.values, "td"), WIDTH)
    model_config = config.for_model(num_items=NUM_ITEMS, inputs=inputs)
    model_class(model_config, input_size=WIDTH * len(inputs))
    config.check_all_read(model_config)


@pytest.mark.parametrize("name", names())
def test_every_yaml_has_its_class_and_opens_with_its_command(name):
    model_class = find_class(name)
    assert issubclass(model_class, AbstractVQ)
    assert model_class.__name__.lower() == name.replace("_", "")
    assert config_path(name).read_text().startswith(f"# python quantization/main.py --quantizer_name {name}")


def test_an_unknown_name_is_an_error_with_the_nearest_one():
    with pytest.raises(ConfigError, match="--quantizer_name rqave: .*did you mean 'rqvae'"):
        config_path("rqave")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder in place of quantization/models and quantization/configs."""
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


def test_a_yaml_without_its_model_file_is_an_error(home):
    with pytest.raises(ConfigError, match="my_vq_b.py: not there"):
        find_class("my_vq_b")


@pytest.mark.parametrize(("number", "source"), [
    (1, "class Other:\n    pass\n"),
    (2, "class MyVQC2:\n    pass\n"),
    (3, "my_vq_c3 = 1\n"),
])
def test_a_model_file_without_its_class_is_an_error(home, number, source):
    (home / f"my_vq_c{number}.py").write_text(source)
    with pytest.raises(ConfigError, match="no class named like the file"):
        find_class(f"my_vq_c{number}")

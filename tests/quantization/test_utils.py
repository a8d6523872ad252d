"""The contract of a quantizer."""

import pytest
import torch

from common.command import errors_of_models
from common.errors import ConfigError
from quantization.models.abstract_vq import AbstractVQ
from quantization.utils import check_contract, checked_codes
from tests.errors import refused


class Stub:
    """A quantizer that returns fixed codes."""

    def __init__(self, codes, codebook_sizes=None):
        self.codes, self.codebook_sizes = codes, codebook_sizes

    def get_codes(self, xs):
        return self.codes


XS = torch.zeros(3, 2)


def place(name: str, method: str) -> str:
    """The location of a method of a class of this file."""
    return f"{__name__}.{name}.{method}"


def test_valid_codes_pass_the_check_unchanged():
    codes = torch.tensor([[0, 1], [1, 1], [2, 0]])
    assert torch.equal(checked_codes(Stub(codes, [3, 2]), XS), codes)


def test_a_vector_of_codes_is_one_level():
    assert checked_codes(Stub(torch.tensor([2, 0, 1])), XS).tolist() == [[2], [0], [1]]


def test_a_vector_of_too_many_codes_is_refused():
    with refused(ConfigError, place("Stub", "get_codes"), names=[4, 3]):
        checked_codes(Stub(torch.zeros(4, dtype=torch.int64)), XS)


def test_short_integers_become_long_ones():
    assert checked_codes(Stub(torch.zeros(3, 2, dtype=torch.uint8)), XS).dtype == torch.int64


@pytest.mark.parametrize(("codes", "kind"), [
    (torch.zeros(3, 2), "float32"), (torch.zeros(3, 2, dtype=torch.bool), "bool"), ([[0], [1], [2]], "list")])
def test_codes_that_are_not_integers_are_refused(codes, kind):
    with refused(ConfigError, place("Stub", "get_codes"), names=[kind]):
        checked_codes(Stub(codes), XS)


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (3, 2, 1), ()])
def test_codes_of_a_wrong_shape_are_refused(shape):
    with refused(ConfigError, place("Stub", "get_codes"), names=[shape, 3]):
        checked_codes(Stub(torch.zeros(shape, dtype=torch.int64)), XS)


@pytest.mark.parametrize(("codes", "sizes", "names"), [
    ([[0, -1], [1, 1], [2, 0]], None, [[0, -1], [2, 1]]),
    ([[0, 1], [1, 1], [3, 0]], [3, 2], [[0, 0], [3, 1], [3, 2]]),
    ([[0, 1], [1, 1], [2, 0]], [3], [[0, 0], [2, 1], [3]]),
])
def test_codes_outside_the_codebooks_are_refused(codes, sizes, names):
    with refused(ConfigError, place("Stub", "get_codes"), names=names):
        checked_codes(Stub(torch.tensor(codes), sizes), XS)


class Signs(AbstractVQ):
    """Two columns, two levels of two codes; keeps the contract."""

    def __init__(self):
        super().__init__({})
        self.dropout = torch.nn.Dropout(0.9)

    def forward(self, xs):
        return self.dropout(xs), xs.new_zeros(()), self.get_codes(xs)

    def get_codes(self, xs):
        return (xs > 0).long()

    def compute_loss(self, forward_outputs, original_xs):
        return {"loss_total": (forward_outputs[0] - original_xs).square().mean(), "other": forward_outputs[1]}

    @property
    def codebook_sizes(self):
        return [2, 2]


ROWS = torch.linspace(-1, 1, 40).reshape(2, 10, 2).transpose(0, 1).reshape(20, 2)  # alternately below and above 0


def test_a_correct_quantizer_passes_and_is_in_evaluation_mode():
    model = Signs().train()
    check_contract(model, ROWS)
    assert not model.training


@pytest.mark.parametrize(("method", "broken", "names"), [
    ("forward", lambda self, xs: (xs, self.get_codes(xs)), ["2"]),
    ("forward", lambda self, xs: xs, ["(20, 2)"]),
    ("forward", lambda self, xs: None, ["None"]),
    ("compute_loss", lambda self, outputs, xs: outputs[1], ["()", "loss_total"]),
    ("compute_loss", lambda self, outputs, xs: {}, ["loss_total"]),
    ("compute_loss", lambda self, outputs, xs: {"loss": outputs[1]}, ["'loss'", "loss_total"]),
    ("compute_loss", lambda self, outputs, xs: {"loss_total": 1.0}, ["loss_total", "float"]),
    ("compute_loss", lambda self, outputs, xs: {"loss_total": outputs[1], "extra": xs}, ["extra", "(20, 2)"]),
    ("get_codes", lambda self, xs: xs, ["torch.float32"]),
    ("get_codes", lambda self, xs: xs > 0, ["torch.bool"]),
    ("get_codes", lambda self, xs: (xs > 0).tolist(), ["list"]),
    ("get_codes", lambda self, xs: (xs > 0).long()[:3], ["(3, 2)"]),
    ("get_codes", lambda self, xs: (xs > 0).long().unsqueeze(2), ["(20, 2, 1)"]),
    ("get_codes", lambda self, xs: (xs > 0).long() + 1, ["[1, 1]", "[2, 2]"]),
    ("get_codes", lambda self, xs: -(xs > 0).long(), ["[-1, -1]", "[0, 0]"]),
    ("get_codes", lambda self, xs: (xs > 0).long()[:, :1], ["[0]", "[1]", "[2, 2]"]),
    ("get_codes", lambda self, xs: (torch.rand_like(xs) > 0.5).long(), []),  # depends on chance
    ("get_codes", lambda self, xs: (xs > xs.mean(dim=0)).long(), []),        # depends on the batch
])
def test_a_broken_contract_names_class_and_method(method, broken, names):
    torch.manual_seed(0)
    # An error in get_codes must not be attributed to forward.
    own = type("Broken", (Signs,), {"forward": lambda self, xs: (xs, xs.new_zeros(()), (xs > 0).long()),
                                    method: broken, "__module__": __name__})
    with refused(ConfigError, place("Broken", method), names=names) as raised:
        check_contract(own(), ROWS)
    assert raised.value.fix


@pytest.mark.parametrize("method", ["forward", "compute_loss", "get_codes"])
def test_an_exception_in_a_method_names_its_line(method, monkeypatch):
    def fail(*args):
        raise RuntimeError("mat1 and mat2 cannot be multiplied")

    monkeypatch.setattr("common.command.plug_in_files", {__file__})
    place_of_raise = f"{__file__}:{fail.__code__.co_firstlineno + 1}"
    names = [fail.__qualname__, "RuntimeError", "mat1 and mat2 cannot be multiplied"]
    with refused(ConfigError, place_of_raise, names=names, fix=["--debug"]) as raised, errors_of_models():
        check_contract(type("Broken", (Signs,), {method: fail})(), ROWS)
    assert isinstance(raised.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [MemoryError(), ConfigError("model_params.file", "is not there")])
def test_user_and_machine_errors_pass_unchanged(error, monkeypatch):
    def forward(self, xs):
        raise error

    monkeypatch.setattr("common.command.plug_in_files", {__file__})
    with pytest.raises(type(error)) as raised, errors_of_models():
        check_contract(type("Failing", (Signs,), {"forward": forward})(), ROWS)
    assert raised.value is error

"""The contract with a quantizer."""

import pytest
import torch

from common.command import errors_of_models
from common.errors import ConfigError
from quantization.models.abstract_vq import AbstractVQ
from quantization.utils import check_contract, checked_codes


class Stub:
    """A quantizer that gives the codes it was made with."""

    def __init__(self, codes, codebook_sizes=None):
        self.codes, self.codebook_sizes = codes, codebook_sizes

    def get_codes(self, xs):
        return self.codes


XS = torch.zeros(3, 2)


def test_codes_pass_the_check_as_they_are():
    codes = torch.tensor([[0, 1], [1, 1], [2, 0]])
    assert torch.equal(checked_codes(Stub(codes, [3, 2]), XS), codes)


def test_a_vector_of_codes_is_one_level():
    assert checked_codes(Stub(torch.tensor([2, 0, 1])), XS).tolist() == [[2], [0], [1]]


def test_short_integers_become_long_ones():
    assert checked_codes(Stub(torch.zeros(3, 2, dtype=torch.uint8)), XS).dtype == torch.int64


@pytest.mark.parametrize(("codes", "message"), [
    (torch.zeros(3, 2), "float32"), (torch.zeros(3, 2, dtype=torch.bool), "bool"), ([[0], [1], [2]], "list")])
def test_codes_that_are_no_integers_are_an_error(codes, message):
    with pytest.raises(ConfigError, match=message):
        checked_codes(Stub(codes), XS)


@pytest.mark.parametrize("shape", [(2, 2), (4,), (3, 2, 1), ()])
def test_codes_of_another_shape_are_an_error_with_the_shape(shape):
    with pytest.raises(ConfigError, match=r"Stub.get_codes: returned shape .* for 3 items"):
        checked_codes(Stub(torch.zeros(shape, dtype=torch.int64)), XS)


@pytest.mark.parametrize(("codes", "sizes"), [
    ([[0, -1], [1, 1], [2, 0]], None),
    ([[0, 1], [1, 1], [3, 0]], [3, 2]),
    ([[0, 1], [1, 1], [2, 0]], [3]),
])
def test_codes_outside_the_codebooks_are_an_error(codes, sizes):
    with pytest.raises(ConfigError, match="codebook"):
        checked_codes(Stub(torch.tensor(codes), sizes), XS)


class Signs(AbstractVQ):
    """Two columns, two levels of two codes; keeps every promise."""

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


ROWS = torch.linspace(-1, 1, 40).reshape(2, 10, 2).transpose(0, 1).reshape(20, 2)  # below and above 0 by turns


def test_a_quantizer_that_keeps_its_promises_passes_and_is_left_out_of_training():
    model = Signs().train()
    check_contract(model, ROWS)
    assert not model.training


@pytest.mark.parametrize(("method", "broken", "message"), [
    ("forward", lambda self, xs: (xs, self.get_codes(xs)), "returned 2 values"),
    ("forward", lambda self, xs: xs, r"returned a tensor of shape \(20, 2\)"),
    ("forward", lambda self, xs: None, "returned a NoneType"),
    ("compute_loss", lambda self, outputs, xs: outputs[1], r"returned a tensor of shape \(\)"),
    ("compute_loss", lambda self, outputs, xs: {}, "returned a dict with nothing in it"),
    ("compute_loss", lambda self, outputs, xs: {"loss": outputs[1]}, "returned a dict with 'loss'"),
    ("compute_loss", lambda self, outputs, xs: {"loss_total": 1.0}, "loss_total is a float"),
    ("compute_loss", lambda self, outputs, xs: {"loss_total": outputs[1], "extra": xs},
     r"extra is a tensor of shape \(20, 2\)"),
    ("get_codes", lambda self, xs: xs, "returned torch.float32"),
    ("get_codes", lambda self, xs: xs > 0, "returned torch.bool"),
    ("get_codes", lambda self, xs: (xs > 0).tolist(), "returned list"),
    ("get_codes", lambda self, xs: (xs > 0).long()[:3], r"returned shape \(3, 2\)"),
    ("get_codes", lambda self, xs: (xs > 0).long().unsqueeze(2), r"returned shape \(.*, 2, 1\)"),
    ("get_codes", lambda self, xs: (xs > 0).long() + 1, r"returned codes from \[1, 1\] to \[2, 2\]"),
    ("get_codes", lambda self, xs: -(xs > 0).long(), "returned codes from"),
    ("get_codes", lambda self, xs: (xs > 0).long()[:, :1], r"returned codes from .* codebooks are \[2, 2\]"),
    ("get_codes", lambda self, xs: (torch.rand_like(xs) > 0.5).long(), "returned different codes for the same items"),
    ("get_codes", lambda self, xs: (xs > xs.mean(dim=0)).long(), "returned different codes for the same items"),
])
def test_a_broken_promise_is_an_error_that_names_the_class_and_the_method(method, broken, message):
    torch.manual_seed(0)
    # What fails in get_codes is not to be blamed on forward.
    own = type("Broken", (Signs,), {"forward": lambda self, xs: (xs, xs.new_zeros(()), (xs > 0).long()),
                                    method: broken})
    with pytest.raises(ConfigError, match=rf"Broken\.{method}: {message}") as raised:
        check_contract(own(), ROWS)
    assert raised.value.exit_code == 2
    assert raised.value.fix


@pytest.mark.parametrize("method", ["forward", "compute_loss", "get_codes"])
def test_an_exception_of_a_method_names_its_line_and_method(method, monkeypatch):
    def fail(*args):
        raise RuntimeError("mat1 and mat2 cannot be multiplied")

    monkeypatch.setattr("common.command.plug_in_files", {__file__})
    with pytest.raises(ConfigError) as raised, errors_of_models():
        check_contract(type("Broken", (Signs,), {method: fail})(), ROWS)
    assert raised.value.where == f"{__file__}:{fail.__code__.co_firstlineno + 1}"
    assert isinstance(raised.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", [MemoryError(), ConfigError("model_params.file", "is not there")])
def test_errors_that_are_the_users_or_the_machines_pass_as_they_are(error, monkeypatch):
    def forward(self, xs):
        raise error

    monkeypatch.setattr("common.command.plug_in_files", {__file__})
    with pytest.raises(type(error)) as raised, errors_of_models():
        check_contract(type("Failing", (Signs,), {"forward": forward})(), ROWS)
    assert raised.value is error

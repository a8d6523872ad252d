import logging

import pytest
import torch

from common.device import resolve_device
from common.errors import ConfigError
from tests.common.helpers import numbers
from tests.errors import refused

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
FIRST_MISSING = f"cuda:{torch.cuda.device_count()}"


@pytest.mark.parametrize("origin", ["--device", "a.yaml:2"])
def test_auto_takes_cuda_if_available(origin, caplog):
    kind = resolve_device("auto", origin).type
    assert kind == ("cuda" if torch.cuda.is_available() else "cpu")
    assert caplog.records == []


def test_the_cpu_is_always_there(caplog):
    assert resolve_device("cpu", "--device") == torch.device("cpu")
    assert caplog.records == []


@pytest.mark.parametrize("name", [pytest.param("cuda", marks=without_cuda), pytest.param("cuda:0", marks=without_cuda),
                                  FIRST_MISSING])
def test_a_missing_gpu_in_a_yaml_falls_back_to_cpu(caplog, name):
    with caplog.at_level(logging.DEBUG):
        assert resolve_device(name, "a.yaml:2") == torch.device("cpu")
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "a.yaml:2" in record.getMessage()
    assert name in record.getMessage()


@pytest.mark.parametrize("name", [pytest.param("cuda", marks=without_cuda), pytest.param("cuda:0", marks=without_cuda),
                                  FIRST_MISSING])
@pytest.mark.parametrize("origin", ["--device", "--common.device"])
def test_a_missing_gpu_on_the_command_line_is_an_error(name, origin):
    with refused(ConfigError, origin, names=[f"'{name}'"], fix=["--device auto", "--device cpu"]):
        resolve_device(name, origin)


NOT_HERE = ["mps", "mps:0", "xpu", "xpu:1", "hpu", "xla", "vulkan", "tpu", "npu:0", "cuda:99", "cuda:99999999999"]


@pytest.mark.parametrize("name", NOT_HERE)
def test_every_device_that_is_missing_is_treated_alike(monkeypatch, caplog, name):
    with refused(ConfigError, "--device", names=[f"'{name}'"], fix=["--device auto", "--device cpu"]):
        resolve_device(name, "--device")
    assert resolve_device(name, "a.yaml:2") == torch.device("cpu")
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert name in record.getMessage()


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", "cpu0"])
def test_an_unknown_device_is_an_error_at_its_origin(name):
    with refused(ConfigError, "a.yaml:2", names=[f"'{name}'"], fix=["auto", "cpu", "cuda", "cuda:"]):
        resolve_device(name, "a.yaml:2")


def test_gpus_are_counted_from_0(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", "a.yaml:2") == torch.device("cuda")
    assert resolve_device("cuda:1", "--device") == torch.device("cuda:1")
    for name in ("cuda:2", "cuda:7", "cuda:256"):  # PyTorch reads 256 as 0
        with refused(ConfigError, "--device", names=[f"'{name}'"]) as raised:
            resolve_device(name, "--device")
        assert "2" in numbers(raised)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_an_available_gpu_is_used(caplog):
    assert resolve_device("cuda:0", "--device") == torch.device("cuda:0")
    assert resolve_device("cuda", "a.yaml:2").type == "cuda"
    assert caplog.records == []

import logging

import pytest
import torch

from common.device import resolve_device
from common.errors import ConfigError

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
FIRST_MISSING = f"cuda:{torch.cuda.device_count()}"


@pytest.mark.parametrize("origin", ["--device", "a.yaml:2"])
def test_auto_is_whatever_there_is(origin, caplog):
    kind = resolve_device("auto", origin).type
    assert kind == ("cuda" if torch.cuda.is_available() else "cpu")
    assert caplog.records == []


def test_the_cpu_is_always_there(caplog):
    assert resolve_device("cpu", "--device") == torch.device("cpu")
    assert caplog.records == []


@pytest.mark.parametrize("name", [pytest.param("cuda", marks=without_cuda), pytest.param("cuda:0", marks=without_cuda),
                                  FIRST_MISSING])
def test_a_yaml_that_asks_for_a_missing_gpu_runs_on_the_cpu_and_says_so_once(caplog, name):
    with caplog.at_level(logging.DEBUG):
        assert resolve_device(name, "a.yaml:2") == torch.device("cpu")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"a.yaml:2 asks for {name}, which is not there: running on the CPU")]


@pytest.mark.parametrize("name", [pytest.param("cuda", marks=without_cuda), pytest.param("cuda:0", marks=without_cuda),
                                  FIRST_MISSING])
@pytest.mark.parametrize("origin", ["--device", "--common.device"])
def test_a_missing_gpu_on_the_command_line_is_an_error(name, origin):
    with pytest.raises(ConfigError, match=f"{origin}: '{name}' is not there.*Fix: --device auto or --device cpu"):
        resolve_device(name, origin)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", "cpu0"])
def test_what_is_no_device_is_an_error_at_its_origin(name):
    with pytest.raises(ConfigError, match="a.yaml:2: .* is no device. Fix: auto, cpu, cuda or cuda:<n>"):
        resolve_device(name, "a.yaml:2")


def test_gpus_are_counted_from_0(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", "a.yaml:2") == torch.device("cuda")
    assert resolve_device("cuda:1", "--device") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="'cuda:2' is not there. 2 CUDA devices are visible"):
        resolve_device("cuda:2", "--device")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_that_is_there_is_taken(caplog):
    assert resolve_device("cuda:0", "--device") == torch.device("cuda:0")
    assert resolve_device("cuda", "a.yaml:2").type == "cuda"
    assert caplog.records == []

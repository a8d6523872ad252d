"""Mark every test. Fail unit tests that start a process or connect to a server.

Three processes run the tests, one file at a time. The file that runs the whole job is first, because it takes longest.
One process runs all files that load a model of transformers, because loading the first model takes seconds. The tests
of faults share their runs, so each of them may run in any process.
"""

import logging
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import PurePath

import pytest

import common  # noqa: F401 (it sets how torch's threads wait, and must do so before torch is loaded)
from common.command import stop_request
from tests.faults.counts import pytest_runtest_logreport, pytest_terminal_summary  # noqa: F401 (pytest calls them)

with suppress(ImportError):  # the tests marked `gpu` also run without hypothesis and xdist
    from hypothesis import settings

    settings.register_profile("certain", derandomize=True, deadline=None, max_examples=50)
    settings.load_profile("certain")

WITH_TRANSFORMERS = {"test_sentence", "test_text_embedding", "test_image_embedding", "test_image_stops", "test_t5",
                     "test_layers", "test_sasrec", "test_encoder_decoder", "test_decoder_only", "test_encoder_retrieve"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        """Give whole files to the processes. All files with transformers count as one file."""

        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            if PurePath(file).parent.name == "faults":
                return nodeid
            return "transformers" if PurePath(file).stem in WITH_TRANSFORMERS else file

    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "faults" not in config.option.markexpr:  # the long form of the fault tests
        long = [item for item in items if item.get_closest_marker("faults")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    items.sort(key=lambda item: item.path.name != "test_commands.py")
    for item in items:
        if "end_to_end" in item.path.parts:
            item.add_marker("e2e")
        elif not any(item.get_closest_marker(name) for name in ("slow", "gpu")):
            item.add_marker("unit")


@pytest.fixture(autouse=True)
def nothing_outside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a unit test that starts a process or connects to a server. Such a test must be marked as slow."""
    if request.node.get_closest_marker("unit") is None:
        return
    start = subprocess.Popen.__init__

    def refuse(self, args, *rest, **options):
        if args[0] != "git":  # a run calls git to record the commit
            raise AssertionError(f"a unit test starts {args}; mark it with @pytest.mark.slow")
        start(self, args, *rest, **options)

    def offline(self, address):
        raise AssertionError(f"a unit test connects to {address}; mark it with @pytest.mark.slow")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(socket.socket, "connect", offline)


@pytest.fixture
def process(monkeypatch):
    """Makes this process number `rank` of `count`."""
    def become(rank: int, count: int = 3) -> None:
        for key, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank,
                           "LOCAL_WORLD_SIZE": count}.items():
            monkeypatch.setenv(key, str(value))
    return become


@pytest.fixture(autouse=True)
def as_before():
    """After each test, restore the log handlers, the exception hook and the signal handlers of the process."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, sys.excepthook
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    sys.excepthook = hook
    for number, receiver in signals.items():
        signal.signal(number, receiver)
    stop_request.signal_number, stop_request._deferred = 0, False

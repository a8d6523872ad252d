import socket

import pytest

from tests.dataloader.helpers import FaultyServer


@pytest.fixture(autouse=True)
def no_network_but_loopback(monkeypatch):
    """Fail a test at once if it looks up a host other than localhost. The failure names the host."""
    look_up = socket.getaddrinfo

    def refuse(host, *args, **kwargs):
        if host not in ("127.0.0.1", "localhost", None):
            raise AssertionError(f"a test looked up {host}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    server = FaultyServer()
    yield server
    server.close()

"""Two processes share the tests, a file at a time; the file that runs the whole job goes first, as it takes longest."""

import pytest

import common  # noqa: F401 (it sets how torch's threads wait, and must do so before torch is loaded)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_commands.py")

"""Two processes share the tests, a file at a time; the files that run the whole job go first, as they take longest."""

import pytest

import common  # noqa: F401 (it sets how torch's threads wait, and must do so before torch is loaded)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)

"""Several processes share the tests: those that run the whole job stay together and go first, as they take longest."""

import pytest

import common  # noqa: F401 (it sets how torch's threads wait, and must do so before torch is loaded)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    together = [item for item in items if "end_to_end" in item.path.parts]
    for item in together:
        item.add_marker(pytest.mark.xdist_group("end_to_end"))  # one fixture, made once, serves them all
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)

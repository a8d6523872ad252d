import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from common import environment
from common.environment import missing

from .conftest import ROOT


@pytest.fixture
def installed(monkeypatch):
    """The installed packages and their versions, as the test sets them."""
    versions = {}

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(environment, "version", version)
    return versions


@pytest.mark.parametrize(("there", "requirement"), [
    ("2.13.0+cpu", "torch>=2.10,<2.15"), ("2.13.0+cu126", "torch==2.13.0"), ("2.13", "torch==2.13.0"),
    ("2.13.0", "torch==2.13"), ("2.10", "torch>=2.9"), ("2.10.0", "torch>=2.10"), ("2.10", "torch<=2.10.0"),
    ("2.9.1", "torch<2.10"), ("2.9", "torch > 2.8.99"), ("10.0", "torch>=9"), ("2.10.0rc1", "torch>=2.10"),
    ("2.13.0.post1", "torch==2.13.0"), ("0.0.1", "torch"), ("1.0", "torch>=1.0  # the first that works")])
def test_a_version_within_its_bounds_satisfies(installed, there, requirement):
    installed["torch"] = there
    assert missing([requirement]) == []


@pytest.mark.parametrize(("there", "requirement"), [
    ("2.9", "torch>=2.10"), ("2.9.9", "torch>=2.10,<2.15"), ("2.15", "torch>=2.10,<2.15"),
    ("2.15.0.dev20260101+cpu", "torch<2.15"), ("2.13.1", "torch==2.13.0"), ("2.10", "torch<2.9"),
    ("2.1", "torch>=2.10"), ("2.10", "torch>2.10.0"), ("2.10.1", "torch<=2.10"), ("9.0", "torch>=10")])
def test_a_version_outside_its_bounds_does_not(installed, there, requirement):
    installed["torch"] = there
    [unmet] = missing([requirement])
    assert unmet.startswith(requirement)
    assert there in unmet.removeprefix(requirement)


def test_a_package_that_is_not_installed_is_missing(installed):
    assert missing(["numpy>=1.26", "no-such_package.x"]) == ["numpy>=1.26", "no-such_package.x"]


def test_comments_and_empty_lines_ask_for_nothing():
    assert missing(["", "   ", "# numpy>=1.26"]) == []


def test_an_old_python_is_missing_something(monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 10, 14))
    assert missing([]) == ["python>=3.11"]
    monkeypatch.setattr(environment.sys, "version_info", (3, 11, 0))
    assert missing([]) == []


@pytest.mark.slow
def test_the_script_prints_what_is_missing(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("pytest>=1\n")
    bad.write_text("pytest>=999\nno-such-package\n")

    def run(*files):
        return subprocess.run([sys.executable, "-P", ROOT / "common" / "environment.py", *files], capture_output=True,
                              text=True, check=False)

    done = run(good)
    assert done.returncode == 0
    assert "pytest" not in done.stdout
    done = run(good, bad)
    assert done.returncode == 1
    first, second = done.stdout.splitlines()
    assert first.startswith("pytest>=999")
    assert pytest.__version__ in first
    assert second == "no-such-package"


def test_this_python_has_what_the_project_needs():
    assert missing((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()) == []

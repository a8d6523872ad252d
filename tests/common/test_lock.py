"""Locks on file systems that do not have them."""

import errno
import os

import pytest

from common.lock import FolderLock, fcntl


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("wait", [False, True])
def test_without_locks_one_warning_names_the_folder(tmp_path, monkeypatch, caplog, number, wait):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(tmp_path, wait), FolderLock(tmp_path / "other"):
        first, second = caplog.records
    assert {first.levelname, second.levelname} == {"WARNING"}
    assert str(tmp_path) in first.getMessage()
    assert str(tmp_path / "other") in second.getMessage()

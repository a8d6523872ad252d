"""One process of several: which errors all of them raise, and what only the first one does."""

import errno
import pickle

import pytest

from common.errors import ConfigError, DataError, LockedError, ResourceError
from common.lock import FolderLock
from dataloader.embeddings import processes
from dataloader.embeddings.encode import HalfPrecisionOverflow
from dataloader.embeddings.processes import (
    decided_by_first,
    done_by_first,
    first_before_others,
    locked_by_first,
    same_error,
)
from tests.errors import refused

FIRST, SECOND, THIRD = (DataError(f"item {number}", "is wrong") for number in range(3))
OVERFLOW = HalfPrecisionOverflow("a model")


@pytest.fixture
def gathered(process, monkeypatch):
    """Makes this process the second of three. Returns the list of the errors that the three processes have.

    The entry of this process is the error that it passes to the others.
    """
    errors: list[Exception | None] = [None, None, None]

    def all_gather(error):
        errors[1] = error
        return errors

    monkeypatch.setattr(processes, "_all_gather", all_gather)
    monkeypatch.setattr(processes, "all_reduce_max", lambda *values: values)
    process(1)
    return errors


def block(own: Exception | None) -> None:
    with same_error(HalfPrecisionOverflow):
        if own is not None:
            raise own


@pytest.mark.parametrize(("before", "own", "after", "raised"), [
    (None, SECOND, None, SECOND), (FIRST, None, None, FIRST), (FIRST, SECOND, None, FIRST), (None, None, THIRD, THIRD),
    (None, SECOND, THIRD, SECOND), (OVERFLOW, SECOND, None, OVERFLOW), (FIRST, OVERFLOW, None, FIRST)])
def test_all_processes_raise_the_error_of_the_lowest_rank(gathered, before, own, after, raised):
    gathered[0], gathered[2] = before, after
    with pytest.raises(type(raised)) as error:
        block(own)
    assert error.value is raised


def test_without_errors_the_block_ends_normally(gathered):
    with same_error():
        pass
    assert gathered == [None, None, None]


def test_an_error_of_the_machine_is_passed_as_a_user_error(gathered):
    with pytest.raises(ResourceError) as error, same_error():
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")
    assert gathered[1] is error.value
    assert str(error.value.where) == "/somewhere"


def test_a_bug_is_not_passed_to_the_others(gathered):
    gathered[0] = FIRST
    with pytest.raises(ZeroDivisionError), same_error():
        1 / 0  # noqa: B018


def test_one_process_raises_its_errors_unchanged():
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError) as error, same_error():  # noqa: PT011
        raise full
    assert error.value is full


@pytest.mark.parametrize("kind", [ConfigError, DataError, LockedError])
def test_an_error_that_is_passed_keeps_its_parts(kind):
    error = kind("--flag x", "is wrong", "It has a reason", "mend it")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(copy) is kind
    assert (copy.where, copy.what, copy.why, copy.fix, str(copy)) == ("--flag x", "is wrong", "It has a reason",
                                                                      "mend it", str(error))


def test_only_the_first_process_decides_works_and_locks(gathered, process, tmp_path):
    called = []

    def work():
        called.append(True)
        return True

    assert not decided_by_first(work)
    assert done_by_first(work) is None
    with FolderLock(tmp_path), locked_by_first(tmp_path):  # by another command, which only the first process notices
        assert called == []
    process(0)
    assert decided_by_first(work)
    assert done_by_first(work)
    assert len(called) == 2
    with locked_by_first(tmp_path), refused(LockedError, tmp_path):
        FolderLock(tmp_path)


def test_the_others_wait_for_the_model_of_the_first(gathered, process):
    called = []
    assert first_before_others(lambda: called.append("second") or "found") == "found"
    gathered[0] = ConfigError("--text_model", "cannot be downloaded")
    with refused(ConfigError, "--text_model"):
        first_before_others(lambda: called.append("too early"))
    gathered[0] = None
    process(0)
    assert first_before_others(lambda: called.append("first") or "downloaded") == "downloaded"
    assert called == ["second", "first"]

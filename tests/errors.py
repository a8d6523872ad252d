"""Check a UserError: its type, its location, its exit code and the values that it names, but not its wording."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from common.errors import UserError


class PrintedError(NamedTuple):
    """The line `error: where: what. why. Fix: fix` that a command prints."""

    where: str
    what: str  # with the reason
    fix: str


class Outcome(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> PrintedError:
        """The error line in stderr. A second error line or a traceback fails the test."""
        assert "Traceback" not in self.err, self.err
        [line] = [line for line in self.err.splitlines() if line.startswith("error: ")] or [self.err]
        where, _, rest = line.removeprefix("error: ").partition(": ")
        what, _, fix = rest.rpartition(" Fix: ")
        return PrintedError(where, what, fix)

    def check_error(self, kind: type[UserError], where: object, *, names: Iterable[object] = (),
                    fix: Iterable[object] = ()) -> None:
        """Check that the command ended with the exit code of `kind` and with an error at `where`.

        names: values that the error must name
        fix: values that the fix must name
        """
        assert self.code == kind.exit_code, self.err
        error = self.error
        assert error.where == str(where), self.err
        missing = [name for name in names if str(name) not in f"{error.where}: {error.what} {error.fix}"]
        assert not missing, self.err
        assert error.fix, self.err
        assert not [name for name in fix if str(name) not in error.fix], self.err


@contextmanager
def refused(kind: type[UserError], where: object = None, *, names: Iterable[object] = (),
            fix: Iterable[object] = ()) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Check that the block raises an error of exactly the type `kind`.

    where: location of the error; None: not checked
    names: values that the error must name
    fix: values that the fix must name
    """
    with pytest.raises(kind) as raised:
        yield raised
    error = raised.value
    assert type(error) is kind, error
    assert where is None or str(error.where) == str(where), error
    assert not [name for name in names if str(name) not in str(error)], error
    assert not [name for name in fix if str(name) not in error.fix], error

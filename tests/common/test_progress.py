import sys

import pytest

from common import progress
from common.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def missing(line: str, *values: str) -> list[str]:
    """The values that a line does not show."""
    return [value for value in values if value not in line]


def test_without_a_terminal_a_line_comes_every_few_seconds(capsys, clock):
    with Progress("train", 60, "steps") as bar:
        for _ in range(12):
            clock[0] += 1
            bar.update(2, loss=0.5, epoch=3)
        first, second = capsys.readouterr().err.splitlines()
    assert not missing(first, "train", "10/60 steps", "17 %", "2.0 steps/s", " 0:25", "loss 0.5000", "epoch 3")
    assert not missing(second, "train", "20/60 steps", "33 %", "2.0 steps/s", " 0:20", "loss 0.5000", "epoch 3")


def test_values_stay_until_newer_ones_arrive(capsys, clock):
    bar = Progress("train", 60)
    bar.update(1, best=0.25)
    clock[0] += 5
    bar.update(1)
    assert capsys.readouterr().err.endswith(", best 0.2500\n")


def test_steps_of_an_earlier_process_do_not_count_as_speed(capsys, clock):
    bar = Progress("train", 100, "steps", initial=90)
    clock[0] += 5
    bar.update(5)
    [line] = capsys.readouterr().err.splitlines()
    assert not missing(line, "train", "95/100 steps", "95 %", "1.0 steps/s", " 0:05")


def test_a_short_task_prints_nothing(capsys, clock):
    with Progress("train", 2) as bar:
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_before_the_first_step_the_eta_is_unknown(capsys, clock):
    bar = Progress("train", 2)
    clock[0] += 5
    bar.update(0)
    assert not missing(capsys.readouterr().err, "0/2 it", "0 %", "0.0 it/s", " ?")


def test_a_bar_that_is_not_kept_is_erased(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("validate", 4, kept=False) as bar:
        bar.update(4)
    assert capsys.readouterr().err.rsplit("\r", 2)[1].strip() == ""


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("train", 4, "steps", initial=1) as bar:
        bar.update(3, best=0.25)
    last = capsys.readouterr().err.rsplit("\r", 1)[1]
    assert not missing(last, "train", "100%", "4/4", "best 0.2500")

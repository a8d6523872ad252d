import re
import sys

import pytest

from common import progress
from common.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns: clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_elsewhere_than_on_a_terminal_a_line_comes_every_few_seconds(capsys, clock):
    with Progress("train", 60, "steps") as bar:
        for _ in range(12):
            clock[0] += 1
            bar.update(2, loss=0.5, epoch=3)
        assert capsys.readouterr().err.splitlines() == [
            "train: 10/60 steps (17 %), 2.0 steps/s, ETA 0:25, loss 0.5000, epoch 3",
            "train: 20/60 steps (33 %), 2.0 steps/s, ETA 0:20, loss 0.5000, epoch 3"]


def test_figures_stay_until_there_are_newer_ones(capsys, clock):
    bar = Progress("train", 60)
    bar.update(1, best=0.25)
    clock[0] += 5
    bar.update(1)
    assert capsys.readouterr().err.endswith(", best 0.2500\n")


def test_what_was_done_in_an_earlier_process_does_not_count_as_speed(capsys, clock):
    bar = Progress("train", 100, "steps", initial=90)
    clock[0] += 5
    bar.update(5)
    assert capsys.readouterr().err == "train: 95/100 steps (95 %), 1.0 steps/s, ETA 0:05\n"


def test_what_is_done_at_once_says_nothing(capsys, clock):
    with Progress("train", 2) as bar:
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_where_nothing_is_done_yet_the_eta_is_unknown(capsys, clock):
    bar = Progress("train", 2)
    clock[0] += 5
    bar.update(0)
    assert "0/2 it (0 %), 0.0 it/s, ETA ?" in capsys.readouterr().err


def test_a_bar_that_is_not_kept_is_wiped_out(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("validate", 4, kept=False) as bar:
        bar.update(4)
    assert capsys.readouterr().err.rsplit("\r", 2)[1].strip() == ""


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("train", 4, "steps", initial=1) as bar:
        bar.update(3, best=0.25)
    assert re.search(r"train: 100%.*4/4 .*best 0\.2500", capsys.readouterr().err)

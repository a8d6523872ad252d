"""Two commands at the same time, and unusual folders, environments and clocks."""

import os
import re
import signal
import socket

import pytest

from common.errors import LockedError
from tests.faults.world import RUNS, STAGES

pytestmark = pytest.mark.slow
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
PATHS = ("data", "runs", "raw/events.csv", "raw/items.csv", "out/list.txt")


def test_a_second_command_on_a_run_is_refused(reference, tmp_path):
    case, other = reference.case("rqvae"), reference.case("rkmeans", "again")
    world = case.before.copy(tmp_path / "world")
    first = world.start(case.script, *case.words, fault={"at": case.point("fsync", "step-000000003"), "do": "stop"})
    try:
        _, status = os.waitpid(first.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        [run] = (world.root / "runs/quantization/tea/rqvae-td").iterdir()
        world.run(case.script, *case.words).check_error(
            LockedError, run.relative_to(world.root), names=[first.pid, socket.gethostname()])
        at_once = world.run(other.script, *other.words)  # another run on the same data
        assert at_once.code == 0, at_once.err
    finally:
        first.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    found = world.files()
    assert [name for name, content in case.after.files().items() if "rqvae" in name and found[name] != content] == []
    assert [name for name, content in other.after.files().items() if "rkmeans" in name and found[name] != content] == []


def test_unusual_folders_and_environments_change_no_result(reference, tmp_path):
    root = tmp_path / "Tee ☃ [1] $HOME"
    world = reference.before("process").copy(root)
    for path in (*root.glob("raw/*"), root / "raw"):
        path.chmod(path.stat().st_mode & ~0o222)
    for name in ("process", "text_embedding", "rqvae", "encoder_decoder", "recommend"):
        words = [str(root / word) if word in PATHS else word for word in STAGES[name].flags.split()]
        outcome = world.run(STAGES[name].script, *words, cwd=tmp_path, fault={"clock": -86_400}, HOME=None,
                            PYTHONHASHSEED="1", TZ="Asia/Kolkata", **ASCII)
        assert outcome.code == 0, outcome.err
    found, expected = world.files(), reference.after("recommend").files()
    same = [name for name in found if name.endswith((".parquet", ".npy", ".safetensors", ".jsonl", ".txt", "latest"))]
    assert len(same) > 10
    assert [name for name in same if found[name] != expected[name]] == []


def test_output_to_an_ascii_terminal_is_escaped(reference, tmp_path):
    world = reference.after("encoder_decoder").copy(tmp_path / "world")
    explained = world.run("quantization/main.py", *RUNS.split(), "--explain", **ASCII)
    assert explained.code == 0, explained.err
    assert re.search(r"\\u[0-9a-f]{4}", explained.out)
    compared = world.run("recommendation/main.py", *RUNS.split(), "--compare", **ASCII)
    assert compared.code == 0, compared.err
    assert r"\u00b1" in compared.out

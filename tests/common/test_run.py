import errno
import json
import logging
import os
import platform
import re
import shutil
import socket
import threading
from contextlib import nullcontext

import pytest
import yaml

from common.errors import ArtifactError, ConfigError, LockedError
from common.lock import FolderLock
from common.run import Run, latest_run, log_to, read_config, save_comparison
from tests.errors import Outcome, refused

CONFIG = {"common": {"seed": 0}, "vq": {"training_params": {"lr": 0.1, "patience": None}}}
INPUTS = {"Toys.emb-td.npy": "abc"}


@pytest.fixture
def new_run(tmp_path):
    def new(config=CONFIG, inputs=INPUTS, command="python train.py --lr 0.1"):
        return Run(tmp_path / "vq-td", config, inputs, command)
    return new


def test_the_same_command_finds_its_own_folder_again(new_run):
    shuffled = {"vq": {"training_params": {"patience": None, "lr": 0.1}}, "common": {"seed": 0}}
    assert new_run().folder == new_run(shuffled, command="python train.py --lr=0.1").folder
    assert new_run().folder.parent.name == "vq-td"


@pytest.mark.slow
def test_the_id_is_the_same_in_another_process(new_run, python):
    done = python("import sys, json; from pathlib import Path; from common.run import Run\n"
                  "print(Run(Path('p'), *map(json.loads, sys.argv[1:]), '').id)",
                  json.dumps(CONFIG), json.dumps(INPUTS))
    assert done.stdout.strip() == new_run().id


def test_another_seed_key_or_input_is_another_run(new_run):
    runs = [new_run(), new_run({**CONFIG, "common": {"seed": 1}}), new_run({**CONFIG, "vq": {}}),
            new_run(inputs={"Toys.emb-td.npy": "abd"}), new_run(inputs={})]
    assert len({run.id for run in runs}) == 5


def test_other_code_is_another_run(tmp_path):
    assert len({Run(tmp_path, CONFIG, INPUTS, "train", code).id for code in ("", "abc", "abd")}) == 3


def test_a_finished_run_records_its_date_machine_and_versions(new_run):
    run = new_run()
    with run.open(force=False):
        run.finish({"metrics": {}})
    summary = run.summary()
    assert summary.keys() >= {"date", "commit", "python", "torch", "threads", "machine", "code", "metrics"}
    assert summary["python"] == platform.python_version()
    assert summary["threads"] >= 1


HOLDER = (os.getpid(), socket.gethostname())
LOCK = "FolderLock = __import__('common.lock', fromlist=['x']).FolderLock\n"


@pytest.mark.slow
def test_an_error_names_the_process_that_holds_the_folder(tmp_path, command):
    with FolderLock(tmp_path):
        done = command(LOCK + "FolderLock(Path(argv[0]))", tmp_path)
    Outcome(done.returncode, done.stdout, done.stderr).check_error(LockedError, tmp_path, names=HOLDER)
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_waiting_process_gets_a_folder_once_it_is_free(tmp_path, command):
    with FolderLock(tmp_path):
        waiting = threading.Thread(target=lambda: done.append(command(
            LOCK + "with FolderLock(Path(argv[0]), wait=True):\n    (Path(argv[0]) / 'held').touch()", tmp_path)))
        done = []
        waiting.start()
        waiting.join(timeout=1)
        assert waiting.is_alive()
        assert not (tmp_path / "held").exists()
    waiting.join(timeout=30)
    assert done[0].returncode == 0, done[0].stderr
    assert (tmp_path / "held").exists()


def test_waiting_for_a_free_folder_locks_it_at_once(tmp_path):
    with FolderLock(tmp_path / "new", wait=True), refused(LockedError, tmp_path / "new", names=HOLDER):
        FolderLock(tmp_path / "new")


def test_an_open_run_is_locked(new_run):
    with new_run().open(force=False), refused(LockedError, new_run().folder, names=HOLDER):
        new_run().open(force=False)
    new_run().open(force=False).__exit__(None, None, None)


@pytest.mark.slow
def test_a_killed_process_holds_no_lock(tmp_path, command):
    done = command(LOCK + "lock = FolderLock(Path(argv[0]))\nos.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert done.returncode == -9
    with FolderLock(tmp_path):
        assert not [part for part in HOLDER if str(part) not in (tmp_path / ".lock").read_text()]


def test_a_refused_process_changes_nothing(new_run):
    run = new_run()
    with run.open(force=False):
        run.append_metrics({"epoch": 1})
        with pytest.raises(LockedError):
            new_run().open(force=True)
        assert run.metrics.read_text() == '{"epoch": 1}\n'


def test_the_folder_holds_the_resolved_configuration_and_the_command(new_run):
    run = new_run()
    with run.open(force=False):
        text = (run.folder / "config.yaml").read_text()
    assert text.startswith("# python train.py --lr 0.1\n")
    assert yaml.safe_load(text) == CONFIG


def test_the_log_of_a_run_goes_to_its_folder(new_run):
    run = new_run()
    logging.getLogger().setLevel(logging.DEBUG)
    with run.open(force=False):
        logging.getLogger("elsewhere").debug("a detail: %s", "é")
    text = (run.folder / "run.log").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if run.id in line and "python train.py --lr 0.1" in line]
    assert "DEBUG elsewhere: a detail: é" in text


def test_a_folder_without_locks_is_usable_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("common.lock.fcntl", None)
    for _ in range(2):
        caplog.clear()
        with FolderLock(tmp_path):
            [record] = caplog.records
            assert record.levelname == "WARNING"
            assert str(tmp_path) in record.getMessage()


def test_opening_a_run_again_keeps_its_files_unless_forced(new_run):
    run = new_run()
    left = [run.checkpoints / "step-000000001.safetensors", run.checkpoints / ".step-2.tmp-1", run.metrics]
    with run.open(force=False):
        for file in left:
            file.write_text("x")
        run.finish({})
    with run.open(force=False):
        assert all(file.exists() for file in left)
        assert run.finished
    with run.open(force=True):
        assert not any(file.exists() for file in left)
        assert not run.finished


@pytest.mark.parametrize("name", ["run.log", ".lock"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_file_of_another_kind_loses_no_result(new_run, name, make):
    run = new_run()
    with run.open(force=False):
        run.finish({})
    (run.folder / name).unlink()
    make(run.folder / name)
    with refused(ConfigError, run.folder / name):
        run.open(force=True)
    assert run.finished
    assert run.checkpoints.exists()


def test_metrics_have_one_record_a_line(new_run):
    run = new_run()
    with run.open(force=False):
        run.append_metrics({"epoch": 1, "loss": 0.1})
        run.append_metrics({"epoch": 2, "loss": 1e-30})
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [
        {"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 1e-30}]


@pytest.mark.parametrize(("num_lines", "left"), [
    (0, ""), (1, '{"epoch": 1}\n'), (2, '{"epoch": 1}\n{"epoch": 2}\n'), (3, '{"epoch": 1}\n{"epoch": 2}\n{"epo')])
def test_lines_after_the_checkpoint_are_dropped(new_run, num_lines, left):
    run = new_run()
    with run.open(force=False):
        run.metrics.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
        run.truncate_metrics(num_lines)
    assert run.metrics.read_text() == left


def test_without_metrics_there_is_nothing_to_drop(new_run):
    run = new_run()
    with run.open(force=False):
        run.truncate_metrics(0)
    assert not run.metrics.exists()


def test_a_finished_run_has_a_summary(new_run):
    run = new_run()
    with run.open(force=False):
        assert not run.finished
        run.finish({"metrics": {"loss": 0.5}})
    assert new_run().finished
    wanted = {"command": "python train.py --lr 0.1", "inputs": INPUTS, "metrics": {"loss": 0.5}}
    assert new_run().summary().items() >= wanted.items()


def test_latest_is_the_newest_finished_run(new_run):
    first, second = new_run(), new_run({**CONFIG, "common": {"seed": 1}})
    assert latest_run(first.parent) is None
    with first.open(force=False), second.open(force=False):
        assert latest_run(first.parent) is None
        first.finish({})
        assert latest_run(first.parent) == first.folder
        second.finish({})
        assert latest_run(first.parent) == second.folder
        first.make_latest()
        assert latest_run(first.parent) == first.folder


def test_without_the_latest_run_the_newest_other_is_used(new_run, caplog):
    runs = [new_run({**CONFIG, "common": {"seed": seed}}) for seed in (1, 2, 3)]
    for number, run in enumerate(runs):
        with run.open(force=False):
            run.finish({})
        os.utime(run.folder / "finished.json", (number, number))
    shutil.rmtree(runs[2].folder)
    assert latest_run(runs[0].parent) == runs[1].folder
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    message = record.getMessage().removeprefix(str(runs[0].parent))
    assert runs[1].id in message
    assert runs[2].id in message  # the missing one
    assert re.search(r"\b2\b", message)  # finished runs
    (runs[0].parent / "latest").unlink()
    assert latest_run(runs[0].parent) == runs[1].folder


def test_a_run_being_repeated_is_not_the_latest(new_run):
    run = new_run()
    with run.open(force=False):
        run.finish({})
    with run.open(force=True):
        assert latest_run(run.parent) is None


def finished(new_run) -> Run:
    run = new_run()
    with run.open(force=False):
        run.finish({"metrics": {}, "codebook_sizes": [4]})
    return run


DEEP = "[" * 100_000 + "]" * 100_000
DAMAGED = {"empty": b"", "list": b"[]", "null": b"null", "deep": DEEP.encode(), "binary": b"\xff\xfe", "zero": b"\0",
           "digits": b'{"inputs": ' + b"9" * 5_000 + b"}", "no keys": b"{}"}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_result_is_refused_with_its_path(new_run, content):
    run = finished(new_run)
    path = run.folder / "finished.json"
    path.write_bytes(content)
    with refused(ArtifactError, path, fix=["python train.py --lr 0.1 --force"]):
        run.summary()


@pytest.mark.parametrize(("key", "value"), [
    ("inputs", []), ("inputs", {"a": 5}), ("inputs", None), ("command", 5), ("schema_version", "2"), ("code", 5),
    ("metrics", []), ("codebook_sizes", "4"), ("codebook_sizes", ["4"]), ("users_per_second", "9")])
def test_a_result_of_wrong_type_is_named_with_its_key(new_run, key, value):
    run = finished(new_run)
    path = run.folder / "finished.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with refused(ArtifactError, path, names=[key], fix=["python train.py --lr 0.1 --force"]):
        run.summary()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"\0", b"../vq-td", b"/etc", b"x" * 10_000, None])
def test_a_damaged_pointer_gives_the_newest_finished_run(new_run, caplog, content):
    run = finished(new_run)
    pointer = run.parent / "latest"
    pointer.unlink()
    if content is None:
        os.mkfifo(pointer)
    else:
        pointer.write_bytes(content)
    assert latest_run(run.parent) == run.folder
    [record] = caplog.records
    assert run.id in record.getMessage()
    assert len(record.getMessage()) < 600 + len(str(run.parent))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"training": "2"}'])
def test_damaged_times_never_lose_the_result(new_run, caplog, content):
    run = new_run()
    with run.open(force=False):
        (run.folder / "times.json").write_bytes(content)
        with run.clock("training"):
            pass
    assert json.loads((run.folder / "times.json").read_text()).keys() == {"training"}
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "times.json" in record.getMessage()


def test_times_before_an_interruption_count_only_for_parts_that_continue(new_run):
    run = new_run()
    with run.open(force=False):
        (run.folder / "times.json").write_text('{"training": 1000, "evaluation": 1000}')
        with run.clock("training"):
            pass
        with run.clock("evaluation", repeated=True):
            pass
        first = run.seconds("evaluation")
        with run.clock("evaluation", repeated=True):  # another part of the same process
            pass
    assert 1000 < run.seconds("training") < 2000
    assert first < run.seconds("evaluation") < 1000
    times = json.loads((run.folder / "times.json").read_text())
    assert times == {name: run.seconds(name) for name in ("training", "evaluation")}


def test_lines_of_metrics_may_be_binary(new_run):
    run = new_run()
    with run.open(force=False):
        run.metrics.write_bytes(b"\xff\n\xfe\n{}\n")
        run.truncate_metrics(2)
    assert run.metrics.read_bytes() == b"\xff\n\xfe\n"


@pytest.mark.parametrize("text", [None, "", "- 1", "a: [1", "a: &a 1\nb: *a", "common: 5", "common: {seed: x}", "\0"])
def test_a_damaged_configuration_of_a_run_is_refused(new_run, text):
    run = finished(new_run)
    path = run.folder / "config.yaml"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with refused(ArtifactError, fix=["train --force"]) as raised:
        read_config(run.folder, "train --force")
    assert str(raised.value.where).startswith(str(path))


@pytest.mark.slow
def test_the_console_gets_messages_and_the_file_details_too(tmp_path, python):
    done = python("""
import logging, sys
from pathlib import Path
from common.run import log_to, log_to_console
log_to_console()
log_to(Path(sys.argv[1]))
for name in ("quantization.trainer", "recommendation", "urllib3", "other"):
    log = logging.getLogger(name)
    log.debug("detail of %s", name)
    log.info("progress of %s", name)
    log.warning("doubt of %s", name)
""", tmp_path / "run.log")
    assert done.stdout == "progress of quantization.trainer\nprogress of recommendation\n"
    assert done.stderr == "doubt of quantization.trainer\ndoubt of recommendation\n"
    log = (tmp_path / "run.log").read_text()
    assert "DEBUG quantization.trainer: detail of quantization.trainer" in log
    assert "WARNING urllib3: doubt of urllib3" in log
    assert "progress of urllib3" not in log


def test_a_log_is_appended_to(tmp_path):
    (tmp_path / "run.log").write_text("yesterday\n")
    log_to(tmp_path / "run.log")
    logging.getLogger("x").warning("today")
    assert (tmp_path / "run.log").read_text().startswith("yesterday\n")
    assert (tmp_path / "run.log").read_text().endswith("WARNING x: today\n")


def test_a_comparison_needs_no_folder_that_can_be_written(tmp_path, monkeypatch):
    assert save_comparison(tmp_path, "a", "b") == f"wrote {tmp_path / 'compare.md'} and compare.csv"
    for number, kind in ((errno.EROFS, "Read-only"), (errno.ENOSPC, None)):
        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("common.run.write_text", fail)
        with nullcontext() if kind else pytest.raises(OSError, match="No space"):
            assert kind in save_comparison(tmp_path, "a", "b")

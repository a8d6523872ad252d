"""One process of several, without the others: which one writes and prints, and how a batch is sharded."""

import logging
import re
import signal

import numpy as np
import pytest
import torch

from common import data_parallel
from common.command import run_command, stop_request
from common.data_parallel import all_gather, all_reduce_sum, mean_of_present, shard_batch, shard_rows
from common.device import resolve_device
from common.distributed import all_gather_rows, all_reduce_max, is_main, rank_seed_parts, world_size
from common.errors import ConfigError, Interrupted, UserError
from common.progress import Progress
from common.publishing import publish, write_text
from common.run import Run, log_to_console
from tests.common.helpers import numbers
from tests.errors import refused


@pytest.fixture
def second(process, monkeypatch):
    """This process is the second of three, and connects to no other."""
    process(1)
    monkeypatch.setattr("common.run.barrier", lambda: None)


def test_one_process_shares_nothing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # not set by torchrun
    monkeypatch.setenv("RANK", "3")
    assert (world_size(), is_main(), rank_seed_parts()) == (1, True, ())
    assert all_reduce_max(3, 0.5) == (3, 0.5)
    array = np.ones(2)
    all_gather_rows(array)
    assert array.tolist() == [1, 1]
    rows = torch.arange(4.0)
    with shard_batch(4) as part:
        assert part.weight(4, 4) == 1.0
        assert rows[part.rows].tolist() == rows.tolist()
        assert all_reduce_sum(rows) is rows
        assert all_gather(rows) is rows


def test_the_mean_of_all_parts_is_the_batchs(process):
    rows = torch.tensor([5.0, 1.0, 4.0, 2.0, 2.0, 3.0, 4.0])
    seen, losses = [], []
    for rank in range(3):
        process(rank)
        with shard_batch(7) as part:
            own = rows[part.rows]
            seen.append(own.tolist())
            losses.append(own.mean() * part.weight(len(own), 7))
    assert seen == [[5.0, 2.0, 4.0], [1.0, 2.0], [4.0, 3.0]]
    assert sum(losses) / 3 == pytest.approx(3.0)  # 21 / 7


def test_each_process_computes_a_very_small_batch_whole(process):
    process(2)
    rows = torch.tensor([1.0, 3.0])
    with shard_batch(2) as part:
        assert rows[part.rows].tolist() == [1.0, 3.0]
        assert part.weight(2, 2) == 1.0
        assert all_reduce_sum(rows) is rows  # no other process is asked


def test_the_parts_rows_come_back_in_their_order(process, monkeypatch):
    whole = torch.arange(10.0).reshape(5, 2)

    def fake_all_gather(parts, own):
        for rank, part in enumerate(parts):
            part.zero_()
            part[:len(whole[rank::3])] = whole[rank::3]
        assert torch.equal(own, parts[2])

    monkeypatch.setattr(data_parallel.dist, "all_gather", fake_all_gather)
    process(2)
    with shard_batch(5) as part:
        gathered = all_gather(whole[part.rows])
        assert torch.equal(gathered, whole)
        assert torch.equal(gathered[shard_rows()], whole[part.rows])


def test_the_mean_of_present_rows_is_the_whole_batchs(process, monkeypatch):
    values, present = torch.tensor([6.0, 0.0, 3.0, 0.0, 9.0]), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    monkeypatch.setattr(data_parallel.dist, "all_reduce", lambda tensor: tensor.fill_(3))
    losses = []
    for rank in range(2):
        process(rank, count=2)
        with shard_batch(5) as part:
            own = mean_of_present(values[part.rows], present[part.rows])
            losses.append(own * part.weight(len(values[part.rows]), 5))
    assert sum(losses) / 2 == pytest.approx(6.0)  # 18 / 3
    assert mean_of_present(values, present) == 6.0


def test_only_the_first_process_writes(second, tmp_path):
    write_text(tmp_path / "text", "a")
    publish(tmp_path / "artifact", lambda path: path.write_text("a"), {"inputs": {}})
    run = Run(tmp_path / "runs", {}, {}, "a command")
    with run.open(force=True):
        run.append_metrics({"epoch": 1})
        run.finish({})
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_logs(second, capfd, monkeypatch):
    monkeypatch.setattr("common.progress.SECONDS_BETWEEN_LINES", 0.0)
    handlers = logging.getLogger().handlers[:]
    try:
        log_to_console()
        logging.getLogger("common").warning("a warning")
        with Progress("work", 2) as progress:
            progress.update()
    finally:
        logging.getLogger().handlers[:] = handlers
    assert capfd.readouterr() == ("", "")


def test_an_error_of_one_process_names_its_number(second, capfd, monkeypatch):
    waited = []
    monkeypatch.setattr("common.command.time.sleep", waited.append)

    def fail(argv):
        raise UserError("here", "it failed", fix="mend it")

    assert run_command(fail, []) == 2
    assert re.fullmatch(r"error: [^:\n]*\b1: here: it failed\. Fix: mend it\n", capfd.readouterr().err)
    assert waited == [5.0]  # if the first process had failed too, torchrun would have ended this one by then


@pytest.mark.parametrize(("error", "code"), [
    (Interrupted(), 128 + signal.SIGTERM), (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed"), 5)])
def test_only_the_first_process_reports_a_shared_error(process, capfd, error, code):
    def fail(argv):
        stop_request.signal_number = signal.SIGTERM
        raise error

    process(1)
    assert run_command(fail, []) == code
    assert capfd.readouterr().err == ""
    process(0)
    assert run_command(fail, []) == code
    assert capfd.readouterr().err.count("error: ") == 1


@pytest.mark.slow
def test_sigterm_ends_a_process_that_waits_for_the_others(command):
    done = command("""import socket, threading, torch.distributed  # before the timer starts
from datetime import timedelta
from common.distributed import process_group
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
os.environ.update(TORCHELASTIC_RUN_ID="none", WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
with process_group(patience=timedelta(seconds=20)):
    pass""")
    assert done.returncode == -signal.SIGTERM  # Python's handler would run only after the wait


@pytest.mark.slow
@pytest.mark.parametrize(("then", "code"), [
    ("pass", 0), ("raise DataError('here', 'is wrong')", 3), ("raise ValueError('oops')", 1),
    ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)", 143)])
def test_a_process_in_a_group_ends_before_the_interpreter_exits(command, tmp_path, then, code):
    body = f"""import atexit, torch.distributed as dist
from common.run import log_to
log_to(Path(argv[0]) / "run.log")
os.environ.update(TORCHELASTIC_RUN_ID="none", WORLD_SIZE="2", RANK="0")
dist.init_process_group("gloo", init_method=f"file://{{argv[0]}}/store", rank=0, world_size=1)
atexit.register(os.abort)
logging.getLogger("common").warning("logged")
sys.stdout.write("written")
{then}"""
    done = command(body, tmp_path)
    assert (done.returncode, done.stdout) == (code, "written")
    assert done.stderr.count("error: ") == (code != 0)
    assert "logged" in (tmp_path / "run.log").read_text()


def test_each_process_takes_its_own_gpu(process, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    process(1, count=2)
    assert resolve_device("auto", "defaults.yaml:3") == torch.device("cuda:1")
    assert resolve_device("cuda", "defaults.yaml:3") == torch.device("cuda:1")
    assert resolve_device("cpu", "--device") == torch.device("cpu")
    with refused(ConfigError, "--device", names=["cuda:0"], fix=["--device cuda", "--device auto"]) as raised:
        resolve_device("cuda:0", "--device")
    assert "2" in numbers(raised)
    process(1, count=3)
    with refused(ConfigError, "torchrun", fix=["--nproc_per_node 2", "--device cpu"]) as raised:
        resolve_device("auto", "defaults.yaml:3")
    assert numbers(raised) >= {"2", "3"}


def test_models_that_differ_are_refused_by_name(process, monkeypatch):
    model = torch.nn.BatchNorm1d(2)
    data_parallel.check_same_model(model)  # one process
    process(0, count=2)
    monkeypatch.setattr(data_parallel, "all_reduce_max", lambda *digests: digests)
    data_parallel.check_same_model(model)
    monkeypatch.setattr(data_parallel, "all_reduce_max",
                        lambda *digests: (*digests[:2], abs(digests[2]) + 1, *digests[3:]))
    with refused(ConfigError, "BatchNorm1d", names=["running_mean"], fix=["torchrun"]) as raised:
        data_parallel.check_same_model(model)
    assert "running_var" not in str(raised.value)

"""benchmarks/gpu.py: goals, results of several runs, the page, and the whole program at toy size."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu_results
from benchmarks.gpu import test_counts as counts_of_tests
from benchmarks.gpu_data import CODEBOOK_SIZES, NUM_ITEMS, generated_shop
from benchmarks.gpu_quality import metrics_lines, ndcgs, run_results, summary
from benchmarks.gpu_results import GOALS, PAGE, RESULTS, Goal, failures, left_out, merge, page, reached, value_of
from common.cli import ROOT
from tests.text import lines_with

MACHINE = {"card": "NVIDIA H100", "driver": "580.1", "cuda": "12.8", "torch": "2.11.0", "python": "3.12.1", "cores": 8,
           "duckdb": None}
HEAD = {"commit": "abc1234", "dirty": False, "smoke": False, "machine": MACHINE, "date": "2026-11-29T10:00:00+00:00"}
TRAINING = {"captured": {"targets_per_second": 90_000.0, "captured_shapes": 16, "warm_up_seconds": 3.25,
                         "peak_gb": 1.5}, "data": "Beauty", "seconds": 9.0}
SPEED = {"training 256": TRAINING, "kernels": {"error": "RuntimeError: the profiler saw no kernels"},
         "training 1024": {"left_out": "no fused attention"}, "seconds": 51.0}
TESTS = {"passed": 100, "failed": 1, "skipped": 2, "failures": ["a::b"], "seconds": 40.0}


@pytest.mark.parametrize(("higher", "value", "result"), [
    (True, 9.9, "missed"), (True, 10.0, "gate"), (True, 20.0, "aim"), (False, 9.9, "gate"), (False, 5.0, "aim"),
    (False, 10.1, "missed"), (False, float("inf"), "missed"), (True, None, "")])
def test_a_value_reaches_the_gate_or_the_aim(higher, value, result):
    assert reached(Goal("a", ("a",), ".1f", None, 10.0, 20.0 if higher else 5.0, higher), value) == result


@pytest.mark.parametrize(("gate", "aim", "result"), [(None, 10.0, "missed"), (5.0, None, "gate"), (None, None, "")])
def test_a_goal_may_lack_a_gate_or_an_aim(gate, aim, result):
    assert reached(Goal("a", ("a",), ".1f", None, gate, aim), 6.0) == result


def test_a_goal_that_a_training_never_reached_differs_from_one_that_was_not_measured():
    [goal] = [goal for goal in GOALS if goal.path == ("quality", "seconds_to_reach")]
    assert value_of(goal, {}) is None
    assert value_of(goal, {"quality": {"left_out": "no data"}}) is None
    assert value_of(goal, {"quality": {"seconds_to_reach": 170.0}}) == 170.0
    assert value_of(goal, {"quality": {"seconds_to_reach": None}}) == float("inf")


def test_results_of_several_parts_are_merged():
    results = merge(merge({}, HEAD, "tests", TESTS), HEAD | {"date": "later"}, "speed", SPEED)
    assert results["parts"] == {"tests": TESTS, "speed": SPEED}
    assert results["date"] == "later"
    assert results["goals"] == {GOALS[0].name: {"value": "90,000", "result": "aim"}}


@pytest.mark.parametrize("other", [{"commit": "other"}, {"dirty": True}, {"machine": {"card": "another"}},
                                   {"smoke": True}])
def test_results_of_another_commit_or_machine_are_dropped(other):
    results = merge(merge({}, HEAD, "tests", TESTS), HEAD | other, "speed", SPEED)
    assert results["parts"] == {"speed": SPEED}


def test_errors_and_failed_tests_are_failures_and_missed_goals_are_not():
    found = failures({"tests": TESTS, "speed": SPEED, "quality": {"error": "it crashed", "seconds": 1.0}})
    for line, words in zip(found, (["tests"], ["speed", "kernels"], ["quality", "crashed"]), strict=True):
        assert lines_with(line, *words)
    assert failures({"speed": {"loop": {"microseconds": 1e6}, "seconds": 1.0}}) == []
    assert left_out({"speed": SPEED}) == ["speed, training 1024: no fused attention"]


def test_the_committed_page_is_generated_from_the_committed_results():
    assert PAGE.read_text(encoding="utf-8") == page(gpu_results.load(RESULTS)), "run: python benchmarks/gpu.py page"


def test_the_page_names_the_commit_of_what_was_not_measured():
    text = page({"commit": "abc1234", "parts": {}})
    for goal in GOALS:
        assert lines_with(text, goal.name, "not run at abc1234")


def test_the_page_shows_measured_values_and_errors():
    text = page(merge(merge({}, HEAD, "tests", TESTS), HEAD, "speed", SPEED))
    assert lines_with(text, GOALS[0].name, "7,500", "40,000", "80,000", "90,000", "aim")
    assert lines_with(text, "NVIDIA H100", "580.1", "2.11.0", "abc1234")
    assert lines_with(text, 100, 1, 2, "passed")
    assert lines_with(text, "captured", "90,000", 16, "3.2", "1.50")
    assert lines_with(text, "kernels", "profiler")


def test_the_page_tells_how_goals_were_measured():
    quality = {"best": 0.0481, "ended": False, "limit": 185, "epochs": 90, "command": "python x", "seconds": 187.0,
               "seconds_to_reach": 170.0}
    quantizer = {"epochs": 2000, "seconds_of_training": 13.5, "seconds_of_first_epoch": 1.5,
                 "seconds_of_8000_epochs": 49.5}
    results = merge(merge({}, HEAD | {"smoke": True}, "speed", {"quantizer": quantizer, "seconds": 14.0}),
                    HEAD | {"smoke": True}, "quality", quality)
    text = page(results)
    assert lines_with(text, "RQ-VAE", "2,000", "13.5", "1.5")
    assert lines_with(text, "RQ-VAE", "8,000", "50", "gate")
    assert lines_with(text, "Beauty", 90, "0.0481", 185)
    assert lines_with(text, "Beauty", "260", "170", "gate")
    assert lines_with(text, "smoke")


def test_saved_results_are_loaded_again(tmp_path):
    path = tmp_path / "new" / "gpu.json"
    assert gpu_results.load(path) == {}
    gpu_results.save(path, {"commit": "abc1234"})
    assert gpu_results.load(path) == {"commit": "abc1234"}
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]


def test_the_reports_of_tests_are_counted():
    first = """<testsuites><testsuite><testcase classname="m" name="good"/>
        <testcase classname="m" name="bad"><failure message="no">trace</failure></testcase>
        <testcase classname="m" name="worse"><error>trace</error></testcase>
        <testcase classname="m" name="without"><skipped/></testcase></testsuite></testsuites>"""
    second = '<testsuites><testsuite><testcase classname="n" name="good"/></testsuite></testsuites>'
    assert counts_of_tests([first, second]) == {"passed": 2, "failed": 2, "skipped": 1,
                                                "failures": ["m::bad", "m::worse"]}


def test_the_metrics_of_a_run_are_read_while_it_trains(tmp_path):
    assert metrics_lines(tmp_path / "list") == []
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "list").write_text(f"{run}\n")
    assert metrics_lines(tmp_path / "list") == []
    first = json.dumps({"epoch": 1, "metrics": {"ndcg@10": 0.25}})
    (run / "metrics.jsonl").write_text(f'{first}\n{{"epoch": 2}}\n{{"epoch": 3, "met')
    assert ndcgs(metrics_lines(tmp_path / "list")) == [0.25]
    (run / "checkpoints" / "step-000000120.safetensors").touch()
    (run / "checkpoints" / "step-000000090.safetensors").touch()
    assert run_results(tmp_path / "list") == {"steps": 120}
    test = {"recall@5": 0.1, "ndcg@5": 0.2, "recall@10": 0.3, "ndcg@10": 0.4}
    (run / "metrics.json").write_text(json.dumps({"alone": {"test": {"all": test | {"recall@20": 0.5}}}}))
    assert run_results(tmp_path / "list") == {"steps": 120, "test": test}


def test_a_curve_is_reduced_to_its_best_values():
    curve = [(10.0, 0.01), (20.0, 0.03), (30.0, 0.02), (40.0, 0.05)]
    assert summary(curve, 0.03) == {"best": 0.05, "wanted": 0.03, "seconds_to_reach": 20.0,
                                    "best_so_far": [(10.0, 0.01), (20.0, 0.03), (40.0, 0.05)]}
    assert summary(curve, 0.06)["seconds_to_reach"] is None
    assert summary([], 0.03)["best"] is None


def test_generated_events_have_the_sizes_of_beauty():
    item, user, split, codes = generated_shop(None)
    assert user[-1] + 1 == 22_363
    assert len(item) == pytest.approx(198_502, rel=0.01)
    assert (split == 2).sum() == (split == 1).sum() == 22_363
    assert codes.shape == (NUM_ITEMS, len(CODEBOOK_SIZES))
    assert (codes.max(axis=0) < CODEBOOK_SIZES).all()
    assert item.max() < NUM_ITEMS


@pytest.mark.slow
def test_the_speed_is_measured_at_toy_size():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "gpu_speed.py"), "measure", "--smoke"],
                          capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    speed = {name: result for line in lines for name, result in json.loads(line).items()}
    assert speed["training 256"]["captured"]["captured_shapes"] == speed["training 256"]["captured"]["shapes"]
    for name in ("loop", "training 1024", "quantizer", "evaluation", "decoding"):
        assert "error" not in speed[name]

"""The tables of recommenders: the trials, the times of reused runs, and paired differences."""

import pytest

from benchmarks import recommenders
from benchmarks.recommenders import paired, short, trial_tables, trials_of, with_first_times
from common.errors import ArtifactError, ConfigError
from tests.errors import refused


def entry(flags: str, run: str = "a", seconds: int = 9, **other) -> dict:
    times = {"seconds": seconds, "cpu_seconds": seconds}
    return {"dataset": "shop", "model": "sasrec", "flags": flags, "run": run, **times, **other}


def test_the_same_settings_are_one_trial():
    runs = [entry("--lr 0.1 --num_layers 1"), entry("--num_layers 1 --prior counting --lr 0.1"), entry("--lr 0.2"),
            entry("--lr 0.3", dataset="other"), entry("--lr 0.3", model="markov")]
    assert trials_of(runs, [runs[0]]) == 2
    assert trials_of(runs, [entry("", model="markov", num_trials=40)]) == 40


def test_the_best_trial_of_a_model_is_first():
    def measured(alone: float, both: float) -> dict:
        return {"trial": True, "protocol": "unseen", "commit": "0123456789", "results": {
            ranker: {"valid": {"all": {"ndcg@10": 0.9}, "unseen": {"ndcg@10": value}}}
            for ranker, value in {"alone": alone, "prior": 0.8, "both": both}.items()}}

    runs = [entry("--lr 0.1 --prior counting", **measured(0.1, 0.3)), entry("--lr 0.2", **measured(0.2, 0.25)),
            entry("--lr 0.3", trial=False)]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in trial_tables(runs).splitlines()[4:]] == [
        ["sasrec", "--lr 0.2", "0123456", "0.2000", "0.2500"], ["sasrec", "--lr 0.1", "0123456", "0.1000", "0.3000"]]


def test_a_reused_run_has_the_times_of_its_training():
    reused = entry("--lr 0.1", seconds=1, trial=False)
    assert with_first_times(reused, [entry("", run="b", seconds=5), entry("", seconds=7)]) == reused | {
        "seconds": 7, "cpu_seconds": 7}
    assert with_first_times(reused, [entry("", run="b", seconds=5)]) == reused


def test_a_paired_difference_has_its_standard_error():
    # ranks 1 and 3 give 1 and 1/2; ranks 0 and 11 give 0; so the differences are 0.5, 0, 1
    mean, error = paired([1, 0, 1], [3, 11, 0])
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx((1 / 6) ** 0.5 / 3 ** 0.5, abs=1e-5)


def test_a_commit_with_changed_files_is_marked():
    assert [short(commit) for commit in ("0123456789abcdef", "0123456789abcdef-dirty", None)] == [
        "0123456", "0123456-dirty", ""]


@pytest.mark.parametrize(("words", "where"), [
    (["sasrec,gru4rec"], "MODEL"), (["sasrec --lr 'x"], "MODEL"), (["saserc"], "MODEL"),
    (["markov", "--seeds=x"], "--seeds")])
def test_wrong_arguments_are_refused_before_the_training(words, where, tmp_path, monkeypatch):
    monkeypatch.setattr(recommenders, "measure", lambda *args: pytest.fail("the training has begun"))
    with refused(ConfigError, where):
        recommenders.main([*words, f"--out={tmp_path / 'new' / 'runs.json'}"])


def test_a_damaged_file_of_runs_is_refused(tmp_path):
    (tmp_path / "runs.json").write_text("{}")
    with refused(ArtifactError, tmp_path / "runs.json", fix=["--out"]):
        recommenders.main(["markov", f"--out={tmp_path / 'runs.json'}"])

"""What the command line refuses before any data set is looked for."""

import pytest

from common.errors import ConfigError
from recommendation.main import main
from recommendation.options import parse_seeds, without_run_list


@pytest.mark.parametrize(("words", "message"), [
    (["--select_by=ndcg@7"], r"--select_by: 'ndcg@7' is no metric of a recommender. did you mean 'ndcg@.*"),
    (["--model=popularity", "--select_by=foo"], "--select_by: popularity does not use select_by"),
    (["--select_by=ndcg@10_stderr"], "is no metric"),
    (["--select_by=hit@10"], "--select_by: 'hit@10' is no metric"),
    (["--seeds="], "--seeds: '' is no list of whole numbers"),
    (["--seeds=1,99999999999"], "--seeds: .* not from 0 to 2147483647"),
    (["--filter_seen="], "filter_seen is None"),
    (["--seeds=1,2", "--seed=3"], "--seeds: stands beside --seed"),
    (["--seeds=1,2", "--run_list=runs"], "--run_list"),
    (["--compare", "--run_list=runs"], "leave out --run_list$"),
    (["--model=popularity", "--lr=1"], "--lr: popularity does not use lr"),
    (["--model=markov", "--max_history=5"], "--max_history: markov does not use max_history"),
    (["--compare", "--model=sasrec"], "--compare: --model=sasrec does not go with it.*leave out --model=sasrec$"),
    (["--compare", "--tag=small", "--quantizer_name=opq"], "leave out --quantizer_name=opq --tag=small$"),
    (["--model=markov", "--top_k=30", "--filter_seen", "--seed=1", "--device=cpu"], "there is no such data set"),
])
def test_what_can_mean_nothing_is_refused_at_once(words, message):
    with pytest.raises(ConfigError, match=message):
        main(["--category=NoSuchDataSet", *words])


@pytest.mark.parametrize("words", [["--run_list", "a"], ["--run_list=a"]])
def test_a_recorded_command_names_no_list_of_runs(words):
    assert without_run_list(["--model", "markov", *words, "--seed=1"]) == ["--model", "markov", "--seed=1"]


def test_seeds_by_hand():
    assert parse_seeds("1,2,30") == [1, 2, 30]


@pytest.mark.parametrize("text", ["", "1,,2", "one", "1,1", "-1,2", "1.5", "2147483648"])
def test_what_is_no_list_of_seeds_is_an_error(text):
    with pytest.raises(ConfigError, match="--seeds: .*Fix: --seeds 1,2,3"):
        parse_seeds(text)

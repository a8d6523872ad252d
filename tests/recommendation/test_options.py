"""Flags that are refused before any dataset is read."""

import pytest

from common.errors import ConfigError
from recommendation.main import main
from recommendation.options import parse_seeds, split_models, without_run_list
from tests.errors import refused


@pytest.mark.parametrize(("words", "where", "names", "fix"), [
    (["--select_by=ndcg@7"], "--select_by", ["'ndcg@7'", "'ndcg@5'"], ["ndcg", "10"]),
    (["--model=popularity", "--select_by=foo"], "--select_by", ["popularity"], []),
    (["--select_by=ndcg@10_stderr"], "--select_by", ["'ndcg@10_stderr'", "'ndcg@10'"], []),
    (["--select_by=hit@10"], "--select_by", ["'hit@10'"], []),
    (["--seeds="], "--seeds", ["''"], ["--seeds 1,2,3"]),
    (["--seeds=1,99999999999"], "--seeds", ["99999999999", 0, 2147483647], ["--seeds 1,2,3"]),
    (["--filter_seen="], "--filter_seen", ["None"], ["auto", "true", "false"]),
    (["--filter_seen=sometimes"], "--filter_seen", ["'sometimes'"], ["auto", "true", "false"]),
    (["--code_hits"], "--code_hits", ["--compare"], ["--compare"]),
    (["--compare", "--filter_seen=auto"], "--compare", [], ["--filter_seen"]),
    (["--prior=nothing"], "--prior", ["'nothing'", "none"], ["none"]),
    (["--model=popularity", "--prior=transitions"], "--prior", ["popularity"], []),
    (["--teacher_weight=1.5"], "--teacher_weight", [1.5], []),
    (["--seeds=1,2", "--seed=3"], "--seeds", [], []),
    (["--seeds=1,2", "--common.seed=3"], "--seeds", ["--common.seed"], []),
    (["--seeds=1,2", "--run_list=no-such-list"], None, ["--seeds", "--run_list"], []),
    (["--compare", "--run_list=no-such-list"], "--compare", [], ["--run_list"]),
    (["--model=popularity", "--lr=1"], "--lr", ["popularity"], []),
    (["--model=markov", "--max_history=5"], "--max_history", ["markov"], []),
    (["--model=markov,markov"], "--model", ["'markov'"], []),
    (["--model=markov,makov"], "--model makov", ["'markov'"], ["--model markov"]),
    (["--model=markov,popularity", "--lr=1"], "--lr", ["markov, popularity"], ["leave"]),
    (["--model=markov,popularity", "--kr=1"], "--kr", [], []),
    (["--model=sasrec,markov", "--neighbours_from=cf"], "--neighbours_from", ["sasrec, markov"], ["leave"]),
    (["--model=markov,popularity", "--top_k=1"], "--top_k", [20], []),
    (["--model=markov,popularity", "--config=a.yaml"], "--config", [], []),
    (["--compare", "--model=sasrec"], "--compare", [], ["--model=sasrec"]),
    (["--compare", "--tag=small", "--quantizer_name=opq"], "--compare", [], ["--quantizer_name=opq --tag=small"]),
    (["--model=markov", "--top_k=30", "--filter_seen", "--seed=1", "--device=cpu"], "--dataset NoSuchDataSet", [],
     ["--dataset NoSuchDataSet"]),
])
def test_flags_without_effect_are_refused_at_once(words, where, names, fix):
    with refused(ConfigError, where, names=names, fix=fix):
        main(["--category=NoSuchDataSet", *words])


def test_several_models_get_the_keys_that_they_have():
    words = ["--model", "markov,counting", "--neighbours_from", "cf", "--top_k=30", "--run_list=a b", "--force"]
    shared = ["--force", "--run_list=a b"]
    assert split_models(words) == [["--model=markov", *shared, "--set=top_k=30"],
                                   ["--model=counting", *shared, "--set=neighbours_from=cf", "--set=top_k=30"]]
    words = ["--model=sasrec,counting,encoder_decoder", "--neighbours_from=cf", "--teacher_weight=0.3",
             "--teacher=counting"]
    assert split_models(words[:2]) == [["--model=sasrec"], ["--model=counting", "--set=neighbours_from=cf"],
                                          ["--model=encoder_decoder", "--set=neighbours_from=cf"]]
    assert split_models(words)[0] == ["--model=sasrec", *(f"--set={word[2:]}" for word in words[1:])]
    assert split_models(["--model=markov", "--lr", "1"]) == [["--model=markov", "--lr", "1"]]
    assert split_models([]) == [[]]


@pytest.mark.parametrize("words", [["--run_list", "a"], ["--run_list=a"]])
def test_a_recorded_command_has_no_run_list(words):
    assert without_run_list(["--model", "markov", *words, "--seed=1"]) == ["--model", "markov", "--seed=1"]


def test_seeds_by_hand():
    assert parse_seeds("1,2,30") == [1, 2, 30]


@pytest.mark.parametrize("text", ["", "1,,2", "one", "1,1", "-1,2", "1.5", "2147483648"])
def test_an_invalid_list_of_seeds_is_refused(text):
    with refused(ConfigError, "--seeds", names=[repr(text)], fix=["--seeds 1,2,3"]):
        parse_seeds(text)

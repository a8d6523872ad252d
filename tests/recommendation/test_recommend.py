"""Recommendations by hand: unusual histories, files of histories, and lists without padding."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError, DataError
from recommendation.dataset import Sequences
from recommendation.evaluator import rank
from recommendation.histories import Histories, Lookup, nearest_id, read_histories
from recommendation.models.abstract_model import AbstractRecommender, Catalogue, Recommendations
from recommendation.recommend import main
from tests.errors import refused
from tests.text import lines_with

from .conftest import NUM_ITEMS

# Training events: [0, 1, 0, 2] and [0, 1]. Popularity: item 0 three, item 1 two, item 2 one. Transitions: 0 -> 1 twice,
# 0 -> 2 once, 1 -> 0 once. Markov adds popularity over one more than the most popular item's: .75, .5, .25.
BY_HAND = [[0, 1, 0, 2, 3, 4], [0, 1, 3, 4]]
PARAMS = {"max_history": 5, "eval_batch_size": 7}


@pytest.fixture
def markov(train):
    return train("markov", BY_HAND)


@pytest.fixture
def ask(markov, capsys):
    """words -> the rows of --format jsonl, and stderr."""
    def run(*words: str) -> tuple[list[dict], str]:
        capsys.readouterr()
        main(markov.argv("--model=markov", "--format=jsonl", *words))
        said = capsys.readouterr()
        return [json.loads(line) for line in said.out.splitlines()], said.err

    return run


def histories_of(*rows: list[int]) -> Histories:
    return Histories([None] * len(rows), np.array(sum(rows, []), dtype=np.int64), np.cumsum([0, *map(len, rows)]),
                     [[] for _ in rows])


@pytest.mark.slow
def test_a_history_by_hand(ask):
    assert ask("--history", "0003", "0000", "--top_k", "4") == ([
        {"items": ["0001", "0002", "0000", "0003"], "titles": ["0001", "0002", "0000", "0003"],
         "scores": [2.5, 1.25, 0.75, 0.0], "unknown": 0}], "")


def test_seen_items_are_left_out_on_request(ask):
    [row], said = ask("--history", "0001", "0000", "--top_k", "3", "--filter_seen")
    assert (row["items"], row["scores"], said) == (["0002", "0003", "0004"], [1.25, 0.0, 0.0], "")


def test_all_events_of_a_user_are_the_history(ask):
    [row], _ = ask("--user", "user 0", "--top_k", "3")
    assert row["user"] == "user 0"
    assert row["items"] == ["0000", "0001", "0002"]  # no item followed item 4, the test event; so popularity
    [row], _ = ask("--user", "user 0", "--top_k", "3", "--filter_seen")
    assert row["items"] == ["0005", "0006", "0007"]


def test_unknown_items_are_left_out_and_counted(ask):
    [row], said = ask("--history", "no such", "0000", "1", "--top_k", "2")
    assert (row["items"], row["unknown"], "fallback" in row) == (["0001", "0002"], 2, False)
    [warning] = said.splitlines()
    assert lines_with(warning, 2, "'no such'", "'1'")


@pytest.mark.slow
@pytest.mark.parametrize(("words", "unknown"), [([], 0), (["none", "of these"], 2)])
def test_unknown_histories_get_popular_items_and_a_warning(ask, words, unknown):
    [row], said = ask("--history", *words, "--top_k", "4")
    assert row == {"items": ["0000", "0001", "0002", "0003"], "titles": ["0000", "0001", "0002", "0003"],
                   "scores": [3.0, 2.0, 1.0, 0.0], "unknown": unknown, "fallback": "popularity"}
    assert len(said.splitlines()) == 1 + bool(unknown)
    assert lines_with(said.splitlines()[-1], 1)


def test_a_large_top_k_gives_the_whole_catalogue(ask):
    [row], said = ask("--history", "0000", "--top_k", "500")
    assert sorted(row["items"]) == sorted([f"000{item}" for item in range(NUM_ITEMS - 1)] + ["NA"])
    [warning] = said.splitlines()
    assert lines_with(warning, 500, 30)
    [row], said = ask("--history", "0000", "NA", "--top_k", "30", "--filter_seen")
    assert len(set(row["items"])) == 28
    [warning] = set(said.splitlines())  # each call of main adds a handler
    assert lines_with(warning, 1)


@pytest.mark.slow
def test_an_unknown_user_is_refused_with_the_nearest_one(ask):
    with refused(DataError, "--user", names=["Tiny", "'user0'", "'user 0'"], fix=["--user='user 0'"]):
        ask("--user", "user0")


@pytest.mark.slow
def test_words_may_be_joined_by_commas(ask):
    assert ask("--history", "0001,0000", "--top_k", "2") == ask("--history", "0001", "0000", "--top_k", "2")
    assert ask("--history=0001", "--history=0000", "--top_k", "2") == ask("--history", "0001, 0000", "--top_k", "2")


def test_an_id_with_commas_is_not_split(markov):
    lookup = Lookup(markov.folder, Sequences.load(markov.folder, "cpu"))
    lookup.item_of["tea, green"] = 5
    words = lookup.split_at_commas(["tea, green", "0001, 0002", "unknown, also", "0003,nothing,"])
    assert words == ["tea, green", "0001", "0002", "unknown, also", "0003", "nothing"]


@pytest.mark.slow
def test_a_file_of_histories_is_answered_line_by_line(ask, markov, tmp_path):
    path, output = tmp_path / "asked.jsonl", tmp_path / "new" / "answers.jsonl"
    path.write_text('["0000"]\n\n{"user": "me", "history": ["x", "0001"]}\n{"user": "user 1"}\n{"history": []}\n')
    rows, said = ask("--histories", str(path), "--top_k", "1")
    assert [(row.get("user"), row["items"], row["unknown"], row.get("fallback")) for row in rows] == [
        (None, ["0001"], 0, None), ("me", ["0000"], 1, None), ("user 1", ["0000"], 0, None),
        (None, ["0000"], 0, "popularity")]
    main(markov.argv("--model=markov", "--format=jsonl", "--histories", str(path), "--top_k=1", f"--output={output}"))
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows


def test_a_model_is_prepared_for_more_histories_than_items(ask, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(AbstractRecommender, "prepare", lambda model: calls.append(1))
    queries = tmp_path / "asked.jsonl"
    for num_histories in (NUM_ITEMS, NUM_ITEMS + 1):
        queries.write_text('["0001"]\n' * num_histories)
        assert len(ask("--histories", str(queries))[0]) == num_histories
    assert calls == [1]


def test_the_table_has_ranks_scores_ids_and_titles(markov, capsys):
    main(markov.argv("--model=markov", "--history", "0003", "0000", "gone", "--top_k", "2"))
    heading, *rows = capsys.readouterr().out.splitlines()
    assert sorted(re.findall(r"\d+", heading)) == ["1", "1", "2"]  # history 1 has two known items and an unknown one
    assert rows == ["   1.        2.5000  0001  0001", "   2.        1.2500  0002  0002"]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "where", "names"), [
    ([], None, ["--user", "--history", "--histories"]),
    (["--user", "a", "--history", "b"], None, ["--user", "--history"]),
    (["--user", "a", "--top_k", "0"], "--top_k 0", [])])
def test_a_command_needs_one_history_and_one_item(ask, words, where, names):
    with refused(ConfigError, where, names=names):
        ask(*words)


@pytest.mark.parametrize(("line", "mended", "names"), [
    ("[0, 1]", '["0", "1"]', []), ('{"user": 3}', '{"user": "3"}', [3]), ('"0000"', '["0000"]', []),
    ("7", '["7"]', []), ("{}", '{"user": "a"}', []), ('{"user": null}', '{"user": "null"}', ["None"]),
    ('["a"', '["a"]', []), ("0000 0001", '["0000", "0001"]', []),
    ('{"usr": "a"}', '{"user": "a"}', ["'usr'", "'user'"]), ('{"history": "ab"}', '{"history": ["ab"]}', [])])
def test_a_line_without_a_history_is_refused(tmp_path, line, mended, names):
    path = tmp_path / "asked.jsonl"
    path.write_text(f'["fine"]\n{line}\n')
    with refused(DataError, f"{path}:2", names=names, fix=['["id", "id"]', '{"user": "id"}']):
        read_histories(path)
    path.write_text(f'["fine"]\n{mended}\n')
    assert len(read_histories(path)) == 2


@pytest.mark.parametrize("line", ['["0000"]', '{"user": "user 1"}', '{"user": "é", "history": []}'])
def test_a_byte_order_mark_before_histories_is_skipped(tmp_path, line):
    path = tmp_path / "asked.jsonl"
    path.write_text(f"{line}\n", encoding="utf-8")
    expected = read_histories(path)
    path.write_text(f"\ufeff{line}\r\n", encoding="utf-8")
    assert read_histories(path) == expected


def test_ids_with_a_dash_are_refused_with_their_spelling(ask, markov):
    with refused(ConfigError, "--user", fix=["--user=--Xk2"]):
        ask("--user", "--Xk2")
    with refused(ConfigError, "-A", fix=["--history=0001 --history=-A --history=--B"]):
        ask("--history", "0001", "-A", "--B", "--top_k", "2")
    assert ask("--history=0001", "--history=-A", "--history=--B", "--top_k", "2")[0][0]["unknown"] == 2


@pytest.mark.parametrize("content", [None, b"\n", b"\xff\xfe"])
def test_a_file_without_histories_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "asked").write_bytes(content)
    with refused(DataError, tmp_path / "asked"):
        read_histories(tmp_path / "asked")


def test_histories_are_never_read_from_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "asked")
    with refused(DataError, tmp_path / "asked"):
        read_histories(tmp_path / "asked")


def test_histories_may_come_from_a_pipe_of_the_shell():
    reader, writer = os.pipe()
    os.write(writer, b'["a"]\n["b"]\n')
    os.close(writer)
    assert [query.history for query in read_histories(Path(f"/dev/fd/{reader}"))] == [["a"], ["b"]]
    os.close(reader)


def test_the_nearest_id_is_found_among_many():
    known = [f"A{number:06d}" for number in range(50_000)]
    text, nearest = nearest_id("a012340", known)
    assert (lines_with(text, "'A012340'"), nearest) == ([text], "A012340")
    text, nearest = nearest_id("what", known)
    assert (lines_with(text, 50000, "'A000000'", "'A049999'"), nearest) == ([text], None)
    assert nearest_id("what", [])[1] is None


class First(AbstractRecommender):
    """Recommends the items from the oldest item of its history on."""

    needs_codes = False

    def recommend(self, histories, top_k):
        items = (histories.items[:, :1] + torch.arange(top_k)) % self.catalogue.num_items
        return Recommendations(items, -torch.arange(top_k, dtype=torch.float32).expand(len(items), -1))


def test_a_long_history_is_cut_but_filtered_as_a_whole():
    first = First({}, Catalogue(20, None, []))
    long = [3, 4, 5, 6, 7, 8, 9]
    ranking = rank(first, histories_of(long, [2]), np.zeros(20), PARAMS, 3)
    assert ranking.items.tolist() == [[5, 6, 7], [2, 3, 4]]
    ranking = rank(first, histories_of(long, [2]), np.zeros(20), PARAMS, 3, filter_seen=True)
    assert ranking.items.tolist() == [[10, 11, 12], [3, 4, 5]]
    assert ranking.scores.tolist() == [[-5, -6, -7], [-1, -2, -3]]


def test_histories_of_all_lengths_share_a_batch(make_model, monkeypatch):
    model, sizes = make_model("decoder_only").eval(), []
    search = type(model).recommend_unseen
    monkeypatch.setattr(type(model), "recommend_unseen", lambda model, histories, seen, top_k: sizes.append(
        len(histories.items)) or search(model, histories, seen, top_k))
    rows = [list(range(number + 1)) for number in range(16)]
    rank(model, histories_of(*rows), np.arange(NUM_ITEMS), PARAMS, 6, filter_seen=True)
    assert sizes == [7, 7, 2]


def test_items_seen_twice_are_left_out_once(make_model):
    model, popularity = make_model("sasrec").eval(), np.arange(NUM_ITEMS)
    once, twice = (rank(model, histories_of(row), popularity, PARAMS | {"max_history": 2}, NUM_ITEMS, filter_seen=True)
                   for row in ([7, 3, 8, 9], [3, 7, 3, 8, 3, 7, 8, 9]))
    assert once.items.tolist() == twice.items.tolist()
    assert sorted(once.items[0].tolist())[:5] == [-1, -1, -1, -1, 0]


def test_a_user_who_has_seen_everything_gets_nothing(model):
    ranking = rank(model, histories_of(list(range(NUM_ITEMS)), [1]), np.arange(NUM_ITEMS), PARAMS, 4, filter_seen=True)
    assert ranking.items[0].tolist() == [-1] * 4
    assert (ranking.items[1] >= 0).all()


def test_no_histories_give_no_rows():
    assert rank(First({}, Catalogue(20, None, [])), histories_of(), np.zeros(20), PARAMS, 3).items.shape == (0, 3)


def test_unseen_items_do_not_depend_on_the_batch(model):
    rng = np.random.default_rng(0)
    rows = [rng.integers(NUM_ITEMS, size=size).tolist() for size in rng.integers(0, 15, size=12)]
    popularity = np.arange(NUM_ITEMS)
    together = rank(model, histories_of(*rows), popularity, PARAMS, 6, filter_seen=True)
    for number, row in enumerate(rows):
        alone = rank(model, histories_of(row), popularity, PARAMS, 6, filter_seen=True)
        assert alone.items[0].tolist() == together.items[number].tolist()
        assert alone.scores[0] == pytest.approx(together.scores[number], abs=1e-4)
        found = together.items[number]
        assert len(set(found.tolist())) == 6
        assert ((found >= 0) & (found < NUM_ITEMS)).all()
        assert not set(found.tolist()) & set(row)


def test_output_never_replaces_what_another_command_has_written(markov, tmp_path):
    queries, notes = tmp_path / "asked.jsonl", tmp_path / "notes"
    queries.write_text('["0000"]\n')
    notes.write_text("mine\n")
    [run] = (tmp_path / "runs").glob("**/finished.json")
    for output in (queries, notes, tmp_path, markov.folder.items, run, run.with_name("predictions.jsonl"),
                   run.with_name("new.safetensors"), run.parents[1] / "latest"):
        content = output.read_bytes() if output.is_file() else None
        with refused(ConfigError, f"--output {output}"):
            main(markov.argv("--model=markov", "--histories", str(queries), f"--output={output}"))
        assert output.is_dir() or (output.read_bytes() if output.exists() else None) == content


@pytest.mark.parametrize("first", ["--format=jsonl", "--format=table"])
@pytest.mark.parametrize("query", [["--history", "0003"], ["--user", "user 0"], ["--history", "none"]])
def test_output_replaces_an_earlier_output_of_any_format(markov, tmp_path, first, query):
    output = tmp_path / "answers"
    main(markov.argv("--model=markov", *query, first, f"--output={output}"))
    main(markov.argv("--model=markov", "--history", "0000", "--format=jsonl", "--top_k=1", f"--output={output}"))
    assert json.loads(output.read_text())["items"] == ["0001"]


def test_a_title_cannot_control_the_terminal(markov, tmp_path, capsys, monkeypatch):
    (tmp_path / "asked").write_text('{"user": "\\u001b[2J\\ud800", "history": ["0000"]}\n')
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sys.stdout.reconfigure(errors="json_escape")
    main(markov.argv("--model=markov", "--histories", str(tmp_path / "asked"), "--top_k=1"))
    assert capsys.readouterr().out.startswith(r"User \u001b[2J\ud800 (")

"""A user's own text files without a header, with other separators, quotes and escapes, and RecBole's split files."""

import gzip
import json
import shlex
import subprocess

import pytest

from common.errors import ConfigError, DataError
from dataloader.process import outdated, process
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.processing import COMMAND
from tests.dataloader.reading import events_of, items_of, local, refused

EVENTS = [("u", "A", 1, 1.0), ("v", "B", 2, 1.0)]
BY_NUMBER = ("--user_column", "1", "--item_column", "2", "--time_column", "3")


def options_of(tmp_path, name: str, text: str, *flags: str):
    (tmp_path / name).write_text(text)
    return make_options(tmp_path / "data", "--dataset", "shop", "--interactions", str(tmp_path / name), *flags)


@pytest.mark.parametrize(("name", "text"), [
    ("x.csv", "u,A,1\nv,B,2\n"), ("x.tsv", "u\tA\t1\nv\tB\t2"), ("x.data", "u\tA\t1\nv\tB\t2"),
    ("x.dat", "u::A::1\nv::B::2\n"), ("x.txt", "u  A  1\n v B   2\n"), ("x.inter", "u\tA\t1\nv\tB\t2\n"),
    ("x.csv", 'u,A,1\n"v",B,2\n')])
def test_columns_without_names_have_numbers(tmp_path, name, text):
    assert events_of(options_of(tmp_path, name, text, "--no_header", "interactions", *BY_NUMBER)) == EVENTS


def test_the_items_may_lack_names_too(tmp_path):
    (tmp_path / "items.tsv").write_text('A\t5" disk\nB\t"Big\n')
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\nu,A,1\n")
    flags = ("--item_id_column", "1", "--title_column", "2")
    items = items_of(local(tmp_path, "--no_header", "items", *flags))
    assert [(item["raw_id"], item["title"]) for item in items] == [("A", '5" disk'), ("B", '"Big')]
    (tmp_path / "interactions.csv").write_text("u,A,1\n")
    assert events_of(local(tmp_path, "--no_header", "both", *flags, *BY_NUMBER)) == EVENTS[:1]


def test_a_missing_header_is_named_with_its_flags(tmp_path):
    refused(options_of(tmp_path, "x.tsv", "u\tA\t1\nv\tB\t2"), ConfigError, f"{tmp_path}/x.tsv:1",
            fix=["--no_header interactions", "--user_column", 3])
    refused(options_of(tmp_path, "x.tsv", "u\tA\t1\n", "--no_header", "interactions", *BY_NUMBER[:-1], "4"),
            ConfigError, "--time_column 4", names=["1, 2, 3"])
    refused(options_of(tmp_path, "x.csv", "user,item,time\nu,A,1\n", "--no_header", "interactions", *BY_NUMBER),
            DataError, f"{tmp_path}/x.csv:1", fix=["--no_header"])


@pytest.mark.parametrize("separator", [";", "\t", "|", "::", " "])
@pytest.mark.parametrize("name", ["x.csv", "x.txt", "x.csv.gz"])
def test_a_plain_separator_is_found(tmp_path, separator, name):
    text = "".join(separator.join(row) + "\n" for row in (("user_id", "item_id", "timestamp"), "uA1", "vB2"))
    options = options_of(tmp_path, name, text)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert events_of(options) == EVENTS


def test_the_separator_flag_decides(tmp_path):
    text = "user_id;item_id;timestamp|x\nu;A;1|2\nv;B;2|2\n"
    refused(options_of(tmp_path, "x.csv", text), ConfigError, f"{tmp_path}/x.csv:1", fix=["--separator ';'", "'|'"])
    flags = ("--separator", ";", "--time_column", "timestamp|x")
    refused(options_of(tmp_path, "x.csv", text, *flags), DataError, f"{tmp_path}/x.csv:2")
    refused(options_of(tmp_path, "x.csv", "user_id,item_id,timestamp\n", "--separator", "|"), ConfigError,
            f"{tmp_path}/x.csv:1", fix=["--separator ,"])
    for word, separator in (("tab", "\t"), ("\\t", "\t"), ("space", " "), ("~~", "~~")):
        rows = "".join(separator.join(row) + "\n" for row in (("user_id", "item_id", "timestamp"), "uA1", "vB2"))
        assert events_of(options_of(tmp_path, "x.csv", rows, "--separator", word)) == EVENTS


@pytest.mark.parametrize(("flag", "value"), [
    ("--separator", '"'), ("--separator", "12345"), ("--separator", "\n"), ("--escape", "x"), ("--escape", "\\\\"),
    ("--escape", '"'), ("--bad_lines", "skip:0%"), ("--bad_lines", "skip:100%"), ("--bad_lines", "skip:5"),
    ("--bad_lines", "skip:")])
def test_wrong_values_of_the_flags_are_refused(tmp_path, flag, value):
    with pytest.raises(ConfigError) as error:
        options_of(tmp_path, "x.csv", "", flag, value)
    assert error.value.where == flag


def test_flags_without_effect_are_refused(tmp_path):
    (tmp_path / "interactions.jsonl").write_text('{"user_id": "u", "item_id": "A", "timestamp": 1}\n')
    for flags in (("--separator", ";"), ("--quoting", "none"), ("--no_header", "interactions"), ("--escape", "\\")):
        refused(local(tmp_path, *flags), ConfigError, names=[flags[0]])
    (tmp_path / "items.csv").write_text("A,Lamp\n")
    refused(local(tmp_path, "--no_header", "both"), ConfigError, "--no_header both")
    with pytest.raises(ConfigError):
        local(tmp_path, "--escape", "\\", "--quoting", "none")


def test_the_quoting_flags_decide(tmp_path):
    text = 'user_id\titem_id\ttimestamp\nu\t"A"\t1\n'
    assert events_of(options_of(tmp_path, "x.tsv", text)) == [("u", "A", 1, 1.0)]
    assert events_of(options_of(tmp_path, "x.tsv", text, "--quoting", "none")) == [("u", '"A"', 1, 1.0)]
    assert events_of(options_of(tmp_path, "x.inter", text)) == [("u", '"A"', 1, 1.0)]
    assert events_of(options_of(tmp_path, "x.inter", text, "--quoting", "double")) == [("u", "A", 1, 1.0)]
    refused(options_of(tmp_path, "x.tsv", text + 'v\t"B\t2\n', "--quoting", "double"), DataError,
            f"{tmp_path}/x.tsv:3")


def test_lone_quotes_cost_no_event(tmp_path):
    text = 'user_id\titem_id\ttimestamp\nu\t"Weird\t1\nu\tB\t2\nu\tAl"\t3\n'
    assert [event[1] for event in events_of(options_of(tmp_path, "x.tsv", text))] == ['"Weird', "B", 'Al"']


@pytest.mark.parametrize(("name", "separator"), [("x.csv", ","), ("x.tsv", "\t")])
def test_an_id_with_a_line_break_is_refused(tmp_path, name, separator):
    rows = [("user_id", "item_id", "timestamp"), ("u", '"A\nB"', "1"), ("v", "B", "2"), ("v", "C", "3")]
    text = "".join(separator.join(row) + "\n" for row in rows)
    refused(options_of(tmp_path, name, text), DataError, f"{tmp_path}/{name}:2", what=["item", repr("A\nB")])


def test_spark_escapes_are_suggested_and_read(tmp_path):
    text = 'user_id,item_id,timestamp\nu,"A \\"x\\", y",1\n' + "".join(f"v,B,{n}\n" for n in range(5))
    refused(options_of(tmp_path, "x.csv", text), DataError, f"{tmp_path}/x.csv:2", fix=["--escape '\\'"])
    assert events_of(options_of(tmp_path, "x.csv", text, "--escape", "\\"))[0][1] == 'A "x", y'


def test_a_file_of_python_literals_is_read(tmp_path):
    records = [{"user_id": user, "item_id": item, "timestamp": time, "other": None} for user, item, time, _ in EVENTS]
    assert events_of(options_of(tmp_path, "x.json", "\n".join(map(repr, records)))) == EVENTS


@pytest.mark.parametrize("name", ["x.csv.gz", "x.jsonl.gz"])
def test_plain_text_may_have_the_name_of_a_gzipped_file(tmp_path, name):
    text = "user_id,item_id,timestamp\nu,A,1\nv,B,2\n" if "csv" in name else "".join(
        json.dumps(dict(zip(("user_id", "item_id", "timestamp"), event, strict=False))) + "\n" for event in EVENTS)
    assert events_of(options_of(tmp_path, name, text)) == EVENTS


HEADER = "user_id:token\titem_id:token\ttimestamp:float"


@pytest.mark.slow
def test_split_files_of_recbole_are_refused_with_a_joining_command(tmp_path):
    folder = tmp_path / "it's raw"
    folder.mkdir()
    for split, row in {"test": "u\tC\t3\n", "train": "u\tA\t1", "valid": "u\tB\t2"}.items():
        (folder / f"shop.{split}.inter").write_text(f"{HEADER}\n{row}")
    options = make_options(tmp_path / "data", "--dataset", "shop", "--raw_dir", str(folder))
    error = refused(options, DataError, folder, names=["shop.train.inter", "shop.valid.inter", "shop.test.inter"])
    command = error.fix.partition(": ")[2]
    assert shlex.split(command)[-1] == str(folder / "shop.inter")
    subprocess.run(["bash", "-c", command], check=True)
    assert [event[1] for event in events_of(options)] == ["A", "B", "C"]


def test_split_files_with_different_columns_have_no_command(tmp_path):
    (tmp_path / "shop.train.inter").write_text(f"{HEADER}\n")
    (tmp_path / "shop.test.inter").write_text("user_id:token\titem_id:token\n")
    error = refused(local(tmp_path), DataError, tmp_path)
    assert "awk" not in error.fix


def test_the_layout_is_remembered_and_a_part_of_the_settings(tmp_path):
    text = "".join(f"u{n % 2};i{n % 3};{n}\n" for n in range(12))
    flags = ("--min_user_interactions=0", "--min_item_interactions=0", *BY_NUMBER)
    layout = ("--no_header", "interactions", "--separator", ";")
    options = options_of(tmp_path, "x.csv", text, *flags, *layout)
    process(options, COMMAND)
    again = make_options(tmp_path / "data", "--dataset", "shop")
    assert again.local.layout == options.local.layout
    assert outdated(again) == outdated(options) == ""
    assert "quoting" in outdated(options_of(tmp_path, "x.csv", text, *flags, *layout, "--quoting", "none"))

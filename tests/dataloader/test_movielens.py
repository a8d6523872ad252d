"""MovieLens out of both archives, tiny ones that are written here in the real ones' form."""

import zipfile

import duckdb
import pytest

from common.artifacts import load_meta
from common.errors import DataError
from dataloader.process import process
from dataloader.sources import movielens
from tests.dataloader.helpers import WHEEL_FOLDER, contents, make_options, write_wheel

# Not sorted, the same second twice, and a user whose first event stands last.
EVENTS = ["196\t2\t3\t881250949", "7\t1\t1\t881250949", "196\t1\t5\t881250949", "7\t3\t4\t878887116",
          "7\t2\t4\t878887117", "12\t1\t2\t1"]
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
}
FLAGS = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
         "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]


def grouplens(folder, events=EVENTS, movies=MOVIES):
    path = folder / "ml-100k.zip"
    lines = ("|".join([raw_id, title, "01-Jan-1995", "", "http://127.0.0.1/x", *(str(int(f in genres)) for f in FLAGS)])
             for raw_id, title, _, genres in movies)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-100k/u.data", "".join(f"{line}\n" for line in events))
        archive.writestr("ml-100k/u.item", "".join(f"{line}\n" for line in lines).encode("latin-1"))
    return path


def recbole(folder, events=EVENTS, movies=MOVIES):
    path = folder / "recbole-1.2.1-py3-none-any.whl"
    write_wheel(path, events, ["\t".join([raw_id, *title_and_year, " ".join(genres)])
                               for raw_id, _, title_and_year, genres in movies])
    return path


BOTH = pytest.mark.parametrize("write", [grouplens, recbole])


def read(path) -> tuple[list[tuple], list[dict]]:
    connection = duckdb.connect()
    records = list(movielens.read([path], connection))
    events = connection.execute("""SELECT raw_user, raw_item, rating, "timestamp" FROM events ORDER BY line""")
    return events.fetchall(), records


@BOTH
def test_events_are_read_in_the_order_of_the_file(tmp_path, write):
    events, _ = read(write(tmp_path))
    assert events == [("196", "2", 3.0, 881250949), ("7", "1", 1.0, 881250949), ("196", "1", 5.0, 881250949),
                      ("7", "3", 4.0, 878887116), ("7", "2", 4.0, 878887117), ("12", "1", 2.0, 1)]


@BOTH
def test_records_have_the_title_as_people_say_it_and_year_and_genres(tmp_path, write):
    _, records = read(write(tmp_path))
    assert {r["raw_id"]: (r["title"], r["year"], r["genres"]) for r in records} == RECORDS


def test_both_packagings_make_the_same_tables(tmp_path):
    tables = []
    for write in (grouplens, recbole):
        raw = write(tmp_path / write.__name__).parent
        options = make_options(tmp_path / "data" / write.__name__, "--dataset", "ml-100k", "--raw_dir", str(raw),
                               "--min_user_interactions=0", "--min_item_interactions=0")
        process(options, "made by a test")
        assert load_meta(options.folder.interactions, "")["num_interactions"] == 6
        tables.append(contents(options.folder))
    assert tables[0] == tables[1]


@BOTH
def test_a_title_with_an_odd_line_separator_stays_one_line(tmp_path, write):
    title = "Star\x85 Wars"
    _, records = read(write(tmp_path, movies=[("1", f"{title} (1977)", (title, "1977"), ["Sci-Fi"])]))
    assert [(record["title"], record["year"]) for record in records] == [(title, "1977")]


def test_the_archive_of_grouplens_is_taken_where_both_are_there(tmp_path):
    archive, _ = grouplens(tmp_path), recbole(tmp_path)
    assert movielens.raw_paths(tmp_path, "ml-100k") == [archive]


def test_a_folder_without_an_archive_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError) as error:
        movielens.raw_paths(tmp_path, "ml-100k")
    assert "ml-100k.zip and recbole-*.whl" in error.value.why
    assert "0_download_dataset.sh --dataset ml-100k" in error.value.fix


def refused(path) -> DataError:
    with pytest.raises(DataError) as error:
        read(path)
    assert error.value.exit_code == 3
    assert str(path) in str(error.value)
    return error.value


@BOTH
def test_an_archive_that_is_cut_off_is_refused(tmp_path, write):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    refused(path)


@BOTH
def test_an_archive_of_something_else_is_refused(tmp_path, write):
    path = write(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-25m/ratings.csv", "userId,movieId\n")
    assert "is not the expected archive" in refused(path).what


@BOTH
@pytest.mark.parametrize("line", ["1\t1\tfive\t1", "1\t1\t5\tyesterday", "1\t1\t5"])
def test_an_event_that_lacks_a_number_is_refused(tmp_path, write, line):
    refused(write(tmp_path, events=[*EVENTS, line]))


def test_an_item_line_without_its_fields_is_refused(tmp_path):
    path = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    write_wheel(path, EVENTS, ["1\tToy Story"])
    refused(path)
    with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as archive:
        archive.writestr("ml-100k/u.data", EVENTS[0])
        archive.writestr("ml-100k/u.item", "1|Toy Story (1995)|1|0\n")
    refused(tmp_path / "ml-100k.zip")


def test_a_wheel_whose_events_are_empty_is_refused(tmp_path):
    path = recbole(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{WHEEL_FOLDER}.inter", "")
        archive.writestr(f"{WHEEL_FOLDER}.item", "")
    refused(path)

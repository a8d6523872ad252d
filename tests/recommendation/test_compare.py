"""The comparison of all finished runs of a dataset."""

import csv
import errno
import json
import re
import shlex
import statistics
from itertools import pairwise

import numpy as np
import pytest

from common.artifacts import dataset_line, load_meta, save_array
from common.errors import ArtifactError, DataError
from common.publishing import meta_path
from recommendation.compare import compare
from recommendation.main import main
from tests.errors import refused
from tests.text import lines_with

from .test_pipeline import HISTORIES, write_data


def rows_of(folder, runs) -> list[dict]:
    with (runs / "recommendation" / folder.name / "compare.csv").open() as file:
        return list(csv.DictReader(file))


def headings(text: str) -> list[str]:
    """The line above each table."""
    return [above for above, line in pairwise(filter(None, text.splitlines())) if line.startswith("| model")]


def training_command(name: str, folder, runs) -> str:
    return (f"python recommendation/main.py --model={name} --category=Tiny --run_root {runs} "
            f"--data_root {folder.data_root}")


@pytest.mark.slow
def test_seeds_of_one_configuration_share_a_row(shop):
    folder, runs, pipeline = shop
    for baseline in ("markov", "popularity"):
        pipeline(baseline).execute(False)
    ndcg = [pipeline("sasrec", seed=seed).execute(False)["test"]["ndcg@10"] for seed in (3, 4)]
    pipeline("sasrec", seed=3, lr=0.5).execute(False)
    text = compare(folder, runs)
    rows = rows_of(folder, runs)
    assert sorted(row["model"] for row in rows) == ["markov", "popularity", "sasrec", "sasrec"]
    assert [float(row["ndcg@10"]) for row in rows] == sorted((float(row["ndcg@10"]) for row in rows), reverse=True)
    [both] = [row for row in rows if row["seeds"] == "3, 4"]
    assert float(both["ndcg@10"]) == pytest.approx(statistics.mean(ndcg))
    [other] = [row for row in rows if row["seeds"] == "3"]
    assert "lr=0.5" in other["settings"].split()
    assert "lr=0.01" in both["settings"].split()  # the YAML has another one
    assert "epochs=2" in both["settings"].split()
    assert f"| {statistics.mean(ndcg):.4f} ± {statistics.stdev(ndcg):.4f} " in text
    assert float(both["ndcg@10_deviation"]) == pytest.approx(statistics.stdev(ndcg))
    assert both["ndcg@10_stderr"] == other["ndcg@10_deviation"] == ""
    assert f"{float(other['ndcg@10']):.4f} (± {float(other['ndcg@10_stderr']):.4f})" in text
    assert all(row["filter_seen"] == "false" for row in rows)
    [heading] = headings(text)
    assert lines_with(heading, 12)  # test events
    assert dataset_line(folder) in text.splitlines()
    assert text.splitlines()[0] in (runs / "recommendation" / folder.name / "compare.md").read_text()


@pytest.mark.slow
def test_runs_of_a_seed_on_two_devices_count_once(shop):
    folder, runs, pipeline = shop
    for device in ("auto", "cpu"):
        pipeline("sasrec", device=device).execute(False)
    compare(folder, runs)
    [row] = [row for row in rows_of(folder, runs) if row["model"] == "sasrec"]
    assert (row["seeds"], row["ndcg@10_deviation"]) == ("0", "")
    assert float(row["ndcg@10_stderr"]) > 0


@pytest.mark.slow
def test_a_run_of_earlier_codes_is_marked(shop):
    def settings() -> list[str]:
        compare(folder, runs)
        return [row["settings"] for row in rows_of(folder, runs)]

    folder, runs, pipeline = shop
    pipeline("decoder_only").execute(False)
    [plain] = settings()
    path = folder.codes("rqvae", "td", None)
    meta = load_meta(path, "")
    save_array(path, np.roll(np.load(path), 1, axis=0), {key: meta[key] for key in meta if key not in (
        "sha256", "size", "schema_version")})
    [marked] = settings()
    assert marked.startswith(f"{plain} ")
    pipeline("decoder_only").execute(False)
    assert sorted(settings()) == [plain, marked]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "content"), [
    ("config.yaml", None), ("config.yaml", ""), ("config.yaml", "a: [1"), ("finished.json", "{}"),
    ("finished.json", "[]"), ("metrics.json", "{}"), ("times.json", "{")])
def test_a_damaged_run_is_left_out_and_named(shop, caplog, name, content):
    folder, runs, pipeline = shop
    pipeline("popularity").execute(False)
    damaged = pipeline("sasrec")
    damaged.execute(False)
    (damaged.run.folder / name).unlink()
    if content is not None:
        (damaged.run.folder / name).write_text(content)
    text = compare(folder, runs)
    assert "| popularity |" in text
    assert "| sasrec" not in text
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert str(damaged.run.folder / name) in record.getMessage()


@pytest.mark.slow
def test_filtered_runs_have_their_own_table(shop):
    folder, runs, pipeline = shop
    pipeline("popularity", filter_seen="true").execute(False)
    [filtered] = headings(compare(folder, runs))
    pipeline("markov").execute(False)
    text = compare(folder, runs)
    assert headings(text)[1] == filtered != headings(text)[0]
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ")] == [
        "model", "markov", "model", "popularity"]
    assert [row["filter_seen"] for row in rows_of(folder, runs)] == ["false", "true"]


@pytest.mark.slow
def test_comparing_gives_commands_of_missing_baselines_and_trains_nothing(shop):
    folder, runs, pipeline = shop
    pipeline("sasrec").execute(False)
    pipeline("markov").execute(False)
    pipeline("popularity", filter_seen="true").execute(False)
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if "compare." not in path.name
              and path.is_file()}
    text = compare(folder, runs)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if "compare." not in path.name
            and path.is_file()} == before
    commands = [line.strip() for line in text.splitlines() if line.startswith("    python ")]
    assert commands == [training_command("popularity", folder, runs),
                        training_command("markov", folder, runs) + " --filter_seen"]
    for command in commands:
        main(shlex.split(command)[2:])
    text = compare(folder, runs)
    assert "    python " not in text
    assert sorted(f"{row['model']} {row['filter_seen']}" for row in rows_of(folder, runs)) == [
        "markov false", "markov true", "popularity false", "popularity true", "sasrec false"]


def test_a_folder_without_write_permission_still_shows_its_table(shop, monkeypatch):
    folder, runs, pipeline = shop
    pipeline("popularity").execute(False)

    def refuse(path, text):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("common.run.write_text", refuse)  # root may write anywhere
    text = compare(folder, runs)
    assert "| popularity |" in text
    last = text.splitlines()[-1]
    assert str(runs / "recommendation" / "Tiny" / "compare.md") in last
    assert "Permission denied" in last


def test_interactions_that_their_meta_does_not_describe_are_refused(shop):
    folder, runs, pipeline = shop
    path = meta_path(folder.interactions)
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_interactions": 5}))
    pipeline("popularity")
    with refused(ArtifactError, folder.interactions, names=["num_interactions", 5]):
        compare(folder, runs)


def test_runs_of_earlier_interactions_are_left_out_and_counted(shop):
    folder, runs, pipeline = shop
    for baseline in ("markov", "popularity"):
        pipeline(baseline).execute(False)
    write_data(folder.data_root.parent, [[*history, 7] for history in HISTORIES])
    command = training_command("encoder_decoder", folder, runs)
    with refused(DataError, runs / "recommendation" / "Tiny", fix=[command]):
        compare(folder, runs)
    pipeline("popularity").execute(False)
    text = compare(folder, runs)
    assert [row["model"] for row in rows_of(folder, runs)] == ["popularity"]
    assert [line for line in text.splitlines() if re.findall(r"\d+", line) == ["2"]]  # the number of earlier runs


def test_without_any_run_the_error_has_the_command(shop):
    folder, runs, _ = shop
    command = training_command("encoder_decoder", folder, runs)
    with refused(DataError, runs / "recommendation" / "Tiny", fix=[command]):
        compare(folder, runs)



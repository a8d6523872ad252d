"""The comparison of all finished runs of a dataset."""

import csv
import errno
import json
import math
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
from recommendation.models import baselines
from tests.errors import refused
from tests.text import lines_with

from .conftest import NUM_ITEMS, SIZES
from .test_pipeline import HISTORIES, RAW_ITEMS, write_data


def rows_of(folder, runs, protocol: str = "all") -> list[dict]:
    """The rows of compare.csv for a protocol, the best first."""
    with (runs / "recommendation" / folder.name / "compare.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["protocol"] == protocol]


def table_rows(text: str) -> list[list[dict]]:
    """The rows of each table in Markdown."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    tables: list[list[dict]] = []
    for cells in lines:
        if cells[0] == "model":
            tables.append([])
            heading = cells
        else:
            tables[-1].append(dict(zip(heading, cells, strict=True)))
    return tables


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
    seeds = [pipeline("sasrec", seed=seed) for seed in (3, 4)]
    of_seeds = [one.execute(False)["alone"] for one in seeds]
    pipeline("sasrec", seed=3, lr=0.5).execute(False)
    text = compare(folder, runs)
    for number, protocol in enumerate(("all", "unseen")):
        ndcg, valid = ([metrics[split][protocol]["ndcg@10"] for metrics in of_seeds] for split in ("test", "valid"))
        rows = rows_of(folder, runs, protocol)
        assert sorted(row["model"] for row in rows) == ["markov", "popularity", "sasrec", "sasrec"]
        values = [float(row["validation_ndcg@10"]) for row in rows]
        assert values == sorted(values, reverse=True)
        [both] = [row for row in rows if row["seeds"] == "3, 4"]
        assert float(both["ndcg@10"]) == pytest.approx(statistics.mean(ndcg))
        assert float(both["validation_ndcg@10"]) == pytest.approx(statistics.mean(valid))
        assert both["runs"] == ", ".join(one.run.id for one in seeds)
        [other] = [row for row in rows if row["seeds"] == "3"]
        assert "lr=0.5" in other["settings"].split()
        assert "lr=0.01" in both["settings"].split()  # the YAML has another one
        assert "epochs=2" in both["settings"].split()
        assert float(both["ndcg@10_deviation"]) == pytest.approx(statistics.stdev(ndcg))
        assert both["ndcg@10_stderr"] == other["ndcg@10_deviation"] == ""
        assert [row["trials"] for row in rows if row["model"] == "sasrec"] == ["2", "2"]  # settings, not seeds
        shown = table_rows(text)[number]
        assert [row["runs"] for row in shown] == [row["runs"] for row in rows]
        [of_both] = [row for row in shown if row["seeds"] == "3, 4"]
        assert of_both["ndcg@10"] == f"{statistics.mean(ndcg):.4f} ± {statistics.stdev(ndcg):.4f}"
        assert of_both["validation ndcg@10"] == f"{statistics.mean(valid):.4f} ± {statistics.stdev(valid):.4f}"
        [of_other] = [row for row in shown if row["seeds"] == "3"]
        assert of_other["ndcg@10"] == f"{float(other['ndcg@10']):.4f} (± {float(other['ndcg@10_stderr']):.4f})"
    found = headings(text)
    assert len(found) == 2
    assert all(lines_with(heading, 12) for heading in found)  # test events
    assert dataset_line(folder) in text.splitlines()
    assert text.splitlines()[0] in (runs / "recommendation" / folder.name / "compare.md").read_text()


def test_the_best_in_validation_is_first_even_if_it_is_worse_in_the_test(shop):
    folder, runs, pipeline = shop
    made = [pipeline(name) for name in ("markov", "popularity")]
    for one, valid, test in zip(made, (0.25, 0.75), (0.5, 0.125), strict=True):
        one.execute(False)
        path = one.run.folder / "metrics.json"
        metrics = json.loads(path.read_text())
        for protocol in ("all", "unseen"):
            metrics["alone"]["valid"][protocol]["ndcg@10"] = valid if protocol == "all" else 1 - valid
            metrics["alone"]["test"][protocol]["ndcg@10"] = test
        path.write_text(json.dumps(metrics))
    tables = table_rows(compare(folder, runs))
    assert [[(row["model"], row["validation ndcg@10"]) for row in rows] for rows in tables] == [
        [("popularity", "0.7500"), ("markov", "0.2500")], [("markov", "0.7500"), ("popularity", "0.2500")]]


def gains(run, key: str) -> list[float]:
    """The ndcg@10 of each line of predictions.jsonl."""
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    return [1 / math.log2(line[key].index(line["target"]) + 2) if line["target"] in line[key][:10] else 0.0
            for line in lines]


@pytest.mark.slow
def test_paired_differences_by_hand(shop):
    folder, runs, pipeline = shop
    made = {"popularity": [pipeline("popularity")], "markov": [pipeline("markov")],
            "sasrec": [pipeline("sasrec", seed=seed) for seed in (0, 1)]}
    for one in sum(made.values(), []):
        one.execute(False)
    for rows, key in zip(table_rows(compare(folder, runs)), ("items", "unseen"), strict=True):
        of_model = {name: [statistics.mean(values) for values in zip(*(gains(one.run.folder, key) for one in of_name),
                                                                     strict=True)] for name, of_name in made.items()}
        names = [row["model"] for row in rows]
        assert sorted(names) == sorted(made)
        others = {"to best": names[0], "to baseline": next(name for name in names if name != "sasrec")}
        for row in rows:
            for column, other in others.items():
                differences = [a - b for a, b in zip(of_model[row["model"]], of_model[other], strict=True)]
                error = statistics.pstdev(differences) / math.sqrt(len(differences))
                expected = "" if other == row["model"] else f"{statistics.mean(differences):+.4f} ± {error:.4f}"
                assert row[column].replace("-0.0000", "+0.0000") == expected.replace("-0.0000", "+0.0000")


def test_runs_of_other_code_are_left_out_and_counted(shop):
    folder, runs, pipeline = shop
    made = [pipeline(name) for name in ("markov", "popularity")]
    for one in made:
        one.execute(False)
    path = made[0].run.folder / "finished.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "other"}))
    text = compare(folder, runs)
    assert [[row["model"] for row in rows] for rows in table_rows(text)] == [["popularity"]] * 2
    assert len([line for line in text.splitlines() if re.findall(r"\d+", line) == ["1"]]) == 1
    assert training_command("markov", folder, runs) in text  # the baseline has no run of this code
    path = made[1].run.folder / "finished.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "other"}))
    with refused(DataError, runs / "recommendation" / "Tiny"):
        compare(folder, runs)


def test_the_row_of_a_prior_has_its_weights(shop):
    folder, runs, pipeline = shop
    one = pipeline("sasrec")
    one.execute(False)
    for name in ("metrics.json", "ranks.json"):
        path = one.run.folder / name
        content = json.loads(path.read_text())
        weights = {"weights": {"all": 0.5, "unseen": 4}} if name == "metrics.json" else {}
        path.write_text(json.dumps(content | dict.fromkeys(("prior", "both"), content["alone"]) | weights))
    assert [[row["model"] for row in rows] for rows in table_rows(compare(folder, runs))] == [
        ["sasrec", "sasrec + none"]] * 2
    assert all({"weight(all)=0.5", "weight(unseen)=4"} <= {*row["settings"].split()} for row in rows_of(folder, runs))


@pytest.mark.slow
def test_code_hits_by_hand(shop):
    folder, runs, pipeline = shop
    path = folder.codes("rqvae", "td", None)
    codes, meta = np.load(path), load_meta(path, "")
    save_array(path, codes, {key: meta[key] for key in meta if key not in ("sha256", "size", "schema_version")}
               | {"disambiguation_level": len(SIZES) - 1})
    one = pipeline("decoder_only")
    one.execute(False)
    assert "code_ndcg" not in compare(folder, runs)
    text = compare(folder, runs, code_hits=True)
    group_of = {raw_id: tuple(row[:-1]) for raw_id, row in zip(RAW_ITEMS, codes.tolist(), strict=True)}
    assert len({*group_of.values()}) < NUM_ITEMS
    lines = [json.loads(line) for line in (one.run.folder / "predictions.jsonl").read_text().splitlines()]
    for rows, key in zip(table_rows(text), ("items", "unseen"), strict=True):
        recall = ndcg = 0.0
        for line in lines:
            groups = list(dict.fromkeys(group_of[item] for item in line[key]))[:10]
            if (target := group_of[line["target"]]) in groups:
                recall += 1 / len(lines)
                ndcg += 1 / math.log2(groups.index(target) + 2) / len(lines)
        assert [rows[0][f"code_{name}@10"] for name in ("recall", "ndcg")] == [f"{recall:.4f}", f"{ndcg:.4f}"]
        assert recall >= float(rows[0]["recall@10"].split()[0])


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
    ("finished.json", "[]"), ("metrics.json", "{}"), ("times.json", "{"), ("ranks.json", None), ("ranks.json", "{}"),
    ("ranks.json", '{"alone": {"all": [1], "unseen": [1]}}')])
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
def test_each_run_is_in_the_tables_of_both_protocols(shop):
    folder, runs, pipeline = shop
    pipeline("popularity", filter_seen="true").execute(False)
    pipeline("markov", filter_seen="false").execute(False)
    text = compare(folder, runs)
    found = headings(text)
    assert len(found) == len({*found}) == 2
    lists = [sorted(row["model"] for row in rows) for rows in table_rows(text)]
    assert lists == [["markov", "popularity"]] * 2
    assert [sorted(row["model"] for row in rows_of(folder, runs, protocol)) for protocol in ("all", "unseen")] == lists
    for row in rows_of(folder, runs, "unseen"):
        assert "filter_seen" in row["settings"]  # the YAML has auto


@pytest.mark.slow
def test_comparing_gives_commands_of_missing_baselines_and_trains_nothing(shop):
    folder, runs, pipeline = shop
    pipeline("sasrec").execute(False)
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if "compare." not in path.name
              and path.is_file()}
    text = compare(folder, runs)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if "compare." not in path.name
            and path.is_file()} == before
    commands = [line.strip() for line in text.splitlines() if line.startswith("    python ")]
    assert commands == [training_command(name, folder, runs) for name in baselines()]
    for command in commands:
        main(shlex.split(command)[2:])
    text = compare(folder, runs)
    assert "    python " not in text
    assert sorted(row["model"] for row in rows_of(folder, runs)) == sorted([*baselines(), "sasrec"])


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



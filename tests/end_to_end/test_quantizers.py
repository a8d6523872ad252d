"""A quantizer other than the default one, its comparison, explanation and export, with the real commands."""

import csv
import json

import numpy as np

from common.errors import DataError
from tests.end_to_end.conftest import NUM_KEPT, ROOT, Tree
from tests.text import lines_with

QUANTIZE = ("python", "quantization/main.py", "--quantizer_name")


def test_reassigned_ids_are_compared_explained_and_exported(baby, tmp_path):
    outcome = baby.command(*QUANTIZE, "rkmeans", "--num_levels", "2", "--codebook_size", "24",
                           "--disambiguation", "reassign")
    assert outcome.code == 0, outcome.err
    codes = np.load(baby.data("Baby.codes-rkmeans-td.npy"))
    meta = json.loads(baby.data("Baby.codes-rkmeans-td.npy.meta.json").read_text())
    assert codes.shape == (NUM_KEPT, 2)
    assert len(np.unique(codes, axis=0)) == NUM_KEPT
    assert (meta["disambiguation_level"], meta["collision_rate_after"]) == (None, 0.0)
    assert meta["collision_rate_before"] > 0
    assert lines_with(outcome.out, f"{meta['collision_rate_before']:.2%}")  # the diagnostics
    assert lines_with(outcome.out, "rkmeans", f"{meta['collision_rate_before']:.4f}", "0.0000")

    shown = baby.command("python", f"{baby.root}/quantization/main.py", "--quantizer_name=rkmeans", "--compare",
                         "--explain", "--export", "out", cwd=tmp_path)
    assert shown.code == 0, shown.err
    runs = baby.root / "runs/quantization/Baby"
    table = (runs / "compare.md").read_text()
    assert "| rkmeans-td " in table
    assert "| rkmeans-td " in shown.out
    assert next(csv.DictReader((runs / "compare.csv").open(newline="")))["tokenizer"] == "rkmeans-td"
    [page] = (runs / "rkmeans-td").glob("*.html")
    assert str(page) in shown.out
    assert "bottle" in shown.out  # a word of item titles, which describes a group
    index = json.loads((tmp_path / "out/Baby.index.json").read_text())
    assert list(index.values()) == [[f"<a_{one}>", f"<b_{two}>"] for one, two in codes]
    with (tmp_path / "out/Baby.ids.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["raw_id"] for row in rows] == list(index)
    assert "'new'" in rows[0]["title"]


def test_comparing_without_any_run_gives_the_command(baby):
    baby.command("python", "quantization/main.py", "--compare").check_error(
        DataError, baby.root / "runs/quantization/Baby", fix=["python quantization/main.py --dataset_name Baby"])


def test_the_help_of_a_quantizer_shows_its_own_keys():
    outcome = Tree(ROOT).command(*QUANTIZE, "rkmeans", "--help", cwd=ROOT / "quantization" / "..")
    assert outcome.code == 0, outcome.err
    for key in ("normalize_residuals", "largest_cluster", "min_utilization"):
        assert f"{key}:" in outcome.out
    assert "latent_size" not in outcome.out.partition("rkmeans_config.yaml:")[2]
    for flag in ("--strict", "--compare", "--explain", "--export"):
        assert flag in outcome.out

"""Quantizers other than the default one, and what is shown of them, through the real commands."""

import csv
import json

import numpy as np

from tests.end_to_end.conftest import NUM_KEPT, ROOT, Tree

QUANTIZE = ("python", "quantization/main.py", "--quantizer_name")


def test_reassigned_ids_have_no_extra_level_and_are_compared_explained_and_exported_from_anywhere(baby, tmp_path):
    outcome = baby.command(*QUANTIZE, "rkmeans", "--num_levels", "2", "--codebook_size", "24",
                           "--disambiguation", "reassign")
    assert outcome.code == 0, outcome.err
    assert "What the semantic IDs are worth" in outcome.out
    assert "collision rate" in outcome.out
    codes = np.load(baby.data("Baby.codes-rkmeans-td.npy"))
    meta = json.loads(baby.data("Baby.codes-rkmeans-td.npy.meta.json").read_text())
    assert codes.shape == (NUM_KEPT, 2)
    assert len(np.unique(codes, axis=0)) == NUM_KEPT
    assert (meta["disambiguation_level"], meta["collision_rate_after"]) == (None, 0.0)
    assert meta["collision_rate_before"] > 0

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
    assert "bottle" in shown.out  # a kind of item, which its group is described by
    index = json.loads((tmp_path / "out/Baby.index.json").read_text())
    assert list(index.values()) == [[f"<a_{one}>", f"<b_{two}>"] for one, two in codes]
    with (tmp_path / "out/Baby.ids.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["raw_id"] for row in rows] == list(index)
    assert "'new'" in rows[0]["title"]


def test_nothing_to_compare_is_an_error_with_the_command_that_makes_it(baby):
    outcome = baby.command("python", "quantization/main.py", "--compare")
    assert outcome.code == 3
    assert "has no finished tokenizer. Fix: python quantization/main.py --dataset_name Baby" in outcome.err
    assert "Traceback" not in outcome.err


def test_the_help_of_a_quantizer_shows_its_own_keys():
    outcome = Tree(ROOT).command(*QUANTIZE, "rkmeans", "--help", cwd=ROOT / "quantization" / "..")
    assert outcome.code == 0, outcome.err
    for key in ("normalize_residuals", "largest_cluster", "min_utilization"):
        assert f"{key}:" in outcome.out
    assert "latent_size" not in outcome.out
    for flag in ("--strict", "--compare", "--explain", "--export DIR"):
        assert flag in outcome.out

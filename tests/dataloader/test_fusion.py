"""Fusion of embeddings: formulas computed by hand, PCA as in scikit-learn, and invalid parts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from common.artifacts import FUSIONS, ids_sha256, load_embeddings, load_mask, load_meta, save_array
from common.cli import ROOT
from common.errors import ArtifactError, ConfigError, DataError
from common.publishing import meta_path
from dataloader.embeddings.transform import publish_embedding
from dataloader.flags import CONFIGS
from dataloader.fusion import fuse, main
from dataloader.options import Alignment, Collaborative, Embedding, Transform, load_section
from tests.dataloader.dataset import write_dataset
from tests.dataloader.fusion_parts import COMMAND, EVENTS, fused, random_parts, shop, unit
from tests.dataloader.helpers import make_options, mentions
from tests.errors import Outcome, refused


def test_concat_scales_unit_vectors_by_the_root_of_the_weight(tmp_path):
    parts = {"td": [[3, 4], [0, -2]], "image": [[0, 5, 0], [1, 2, 2]]}
    vectors = fused(shop(tmp_path, parts, "--fusion_weights", "4,9"))
    np.testing.assert_allclose(vectors, [[1.2, 1.6, 0, 3, 0], [0, -2, 1, 2, 2]], atol=1e-6)


def test_inner_products_are_weighted_sums_of_cosines(tmp_path):
    parts = random_parts(dims=(5, 3, 4))
    options = shop(tmp_path, parts, "--fusion_parts", "mine,td,image", "--fusion_weights", "0.5,2,1")
    td, image, mine = (unit(part) @ unit(part).T for part in parts.values())
    vectors = fused(options)
    np.testing.assert_allclose(vectors @ vectors.T, 0.5 * mine + 2 * td + image, atol=1e-5)


def test_a_missing_part_becomes_the_mean_of_the_others(tmp_path):
    parts = random_parts()
    options = shop(tmp_path, parts, missing={"image": [2, 5], "td": [5]})
    vectors, others = fused(options), [0, 1, 3, 4, 6, 7]
    images = unit(parts["image"][others])
    np.testing.assert_allclose(vectors[2, 5:], images.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(vectors[2, 5:] @ vectors[others, 5:].T, (images @ images.T).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(vectors[2, :5], unit(parts["td"])[2], atol=1e-6)
    np.testing.assert_array_equal(load_mask(options.folder, "fused-concat"), np.arange(8) != 5)
    np.testing.assert_allclose(vectors[5], np.delete(vectors, 5, axis=0).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30], ids=["tiny", "huge"])
def test_vectors_of_any_length_are_fused(tmp_path, size):
    parts = random_parts()
    vectors = fused(shop(tmp_path, {"td": parts["td"] * size, "image": parts["image"]}))
    np.testing.assert_allclose(vectors[:, :5], unit(parts["td"]), atol=1e-5)


def test_pca_is_scikit_learn_s_of_the_concatenation(tmp_path):
    parts = random_parts(40)
    vectors = fused(shop(tmp_path, parts, "--fusion_dim", "4", "--fusion_weights", "4,1", suffix="fused-pca"))
    expected = PCA(4).fit_transform(np.hstack([2 * unit(parts["td"]), unit(parts["image"])]))
    signs = np.sign((vectors * expected).sum(axis=0))
    np.testing.assert_allclose(vectors, expected * signs, atol=1e-5)


def test_too_many_pca_dimensions_are_an_error_with_the_maximum(tmp_path):
    with refused(ConfigError, "--fusion_dim 8", names=[7]):
        fused(shop(tmp_path, random_parts(), "--fusion_dim", "8", suffix="fused-pca"))
    fused(shop(tmp_path, random_parts(), "--fusion_dim", "7", suffix="fused-pca"))


# Parts that are missing, damaged, of other items, or stale


@pytest.mark.parametrize(("part", "script"), [
    ("td", "3_get_text_emb.sh --dataset Baby"), ("mini", "3_get_text_emb.sh --dataset Baby --suffix mini"),
    ("image", "4_get_image_emb.sh --dataset Baby")])
def test_a_missing_part_names_its_command(tmp_path, part, script):
    options = shop(tmp_path, {"mine": np.eye(8)}, "--fusion_parts", f"mine,{part}")
    with refused(DataError, options.folder.embeddings(part)) as raised:
        fused(options)
    assert raised.value.fix == f"bash dataloader/{script} --data_root {tmp_path}"


def foreign_items(vectors, meta):
    return vectors, {**meta, "items_sha256": ids_sha256(["other", "items"])}


def another_order(vectors, meta):
    return vectors[::-1], {**meta, "items_sha256": ids_sha256([f"raw-{n}" for n in reversed(range(8))])}


def a_row_more(vectors, meta):
    return np.vstack([vectors, vectors[:1]]), meta


def an_older_list(vectors, meta):
    return vectors, {**meta, "inputs": {"items.parquet": "0" * 64}}


@pytest.mark.parametrize("change", [foreign_items, another_order, a_row_more, an_older_list])
@pytest.mark.parametrize("suffix", ["fused-concat", "fused-align"])
def test_a_part_of_other_items_is_refused(tmp_path, change, suffix):
    options = shop(tmp_path, random_parts(), suffix=suffix)
    path = options.folder.embeddings("image")
    vectors, meta = change(np.load(path), {k: v for k, v in load_meta(path, "").items() if k not in ("sha256", "size")})
    save_array(path, vectors, meta)
    with refused(ArtifactError, path, names=["items.parquet"]) as raised:
        fused(options)
    assert raised.value.fix.startswith("make image --force") or "--suffix image" in raised.value.fix
    assert not options.folder.embeddings(suffix).exists()


@pytest.mark.parametrize(("bad", "named"), [(np.nan, "[3]"), (0, "raw-3")])
def test_an_invalid_row_is_named_and_nothing_is_published(tmp_path, bad, named):
    options = shop(tmp_path, random_parts())
    path = options.folder.embeddings("td")
    vectors, meta = np.load(path), load_meta(path, "")
    vectors[3] = bad
    save_array(path, vectors, {k: v for k, v in meta.items() if k not in ("sha256", "size")})
    with refused(DataError, path, names=[named]):
        fused(options)
    assert not options.folder.embeddings("fused-concat").exists()


def test_the_artifact_is_stale_after_a_part_changes(tmp_path):
    options = shop(tmp_path, random_parts(), "--fusion_weights", "2,1", missing={"image": [1]})
    before, path = fused(options), options.folder.embeddings("fused-concat")
    meta = load_meta(path, "")
    assert meta["inputs"] == {p.name: load_meta(p, "")["sha256"] for p in (
        options.folder.items, options.folder.embeddings("td"), options.folder.embeddings("image"))}
    assert meta["settings"]["parts"] == ["td", "image"]
    assert meta["settings"]["weights"] == [2, 1]
    publish_embedding(Embedding(options.folder, "td", Transform()), random_parts(seed=1)["td"], {}, "make td")
    with refused(ArtifactError, path, names=["Baby.emb-td.npy"]) as raised:
        load_embeddings(options.folder, "fused-concat")
    assert raised.value.fix == f"{COMMAND} --force"
    assert not np.array_equal(fused(options), before)


def test_a_second_run_reuses_the_vectors_until_a_setting_changes(tmp_path):
    options = shop(tmp_path, random_parts())
    path = options.folder.embeddings("fused-concat")
    fused(options)
    written = path.stat().st_ino
    fused(options)
    assert path.stat().st_ino == written
    for change in ({"force": True}, {"weights": (2.0, 1.0)}, {"parts": ("image", "td")},
                   {"target": options.target._replace(transform=Transform(l2=True))}):
        written = path.stat().st_ino
        fused(options._replace(**change))
        assert path.stat().st_ino != written  # a new file took its place


def test_the_transform_flags_belong_to_the_fused_embedding(tmp_path):
    options = shop(tmp_path, random_parts(40), "--pca", "3", "--whiten", "--zscore", "--l2")
    vectors = fused(options)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors.shape == (40, 3)
    assert load_meta(options.folder.embeddings("fused-concat"), "")["settings"]["transform"] == {
        "pca": 3, "whiten": True, "zscore": True, "l2": True}


# The collaborative part


def test_cf_is_made_first_if_missing_or_stale(tmp_path):
    options = shop(tmp_path, random_parts(), "--fusion_parts", "td,cf", "--l2")
    path = options.folder.embeddings("cf")
    assert not path.exists()
    assert fused(options).shape[1] == 5 + np.load(path).shape[1]
    assert load_meta(path, "")["settings"]["transform"]["l2"] is False
    assert load_meta(path, "")["command"] == f"{COMMAND} --dataset Baby --suffix cf --data_root {tmp_path}"
    fuse(options._replace(target=options.target._replace(suffix="cf")), "by hand")  # with --l2
    by_hand = path.read_bytes()
    fused(options)
    assert path.read_bytes() == by_hand
    write_dataset(tmp_path, [f"text {n}" for n in range(8)], events=[(u, i, t, "train") for u, i, t, _ in EVENTS])
    fused(options)
    assert load_meta(path, "")["command"] != "by hand"


# The command


@pytest.mark.parametrize(("suffix", "script"), [
    ("td", "3_get_text_emb.sh --dataset Baby"), ("mini", "3_get_text_emb.sh --dataset Baby --suffix mini"),
    ("image", "4_get_image_emb.sh --dataset Baby")])
def test_the_error_of_a_suffix_names_its_step(tmp_path, suffix, script):
    with refused(ConfigError, f"--suffix {suffix}", names=["cf", *FUSIONS]) as raised:
        main(["--suffix", suffix, "--data_root", str(tmp_path)])
    assert raised.value.fix == f"bash dataloader/{script} --data_root {tmp_path}"


def test_the_fix_of_a_misspelt_suffix_names_the_nearest(tmp_path):
    with refused(ConfigError, "--suffix fused_concat") as raised:
        main(["--suffix", "fused_concat", "--data_root", str(tmp_path)])
    assert raised.value.fix == "--suffix fused-concat"


def test_the_error_of_a_dataset_not_processed_names_the_command(tmp_path):
    with refused(ConfigError, "--dataset Baby", fix=["bash dataloader/run_pipeline.sh --dataset Baby"]):
        fuse(make_options(tmp_path, "--suffix", "fused-concat").fusion, COMMAND)


@pytest.mark.parametrize(("old", "new", "named"), [
    ("  lr: 2.0e-3", "  lr: fast", ["fused-align.lr", "'fast'", "float"]),
    ("  lr: 2.0e-3", "  lr: -1", ["fused-align.lr", -1.0, 0]),
    ("  patience: 10", "  patence: 10", ["fused-align.patence", "'patience'"]),
    ("  optimizer: AdamW", "  optimizer: adamw", ["'adamw'", "'AdamW'"]),
    ("  epochs: 100", "  epochs: 100\n  epochs: 2", ["fused-align.epochs"]),
    ("  tolerance: 0.005", "  tolerance: 2", ["cf.tolerance", 2.0, 0, 1])])
def test_a_bad_hyperparameter_is_an_error_with_its_line(tmp_path, old, new, named):
    text, path = (CONFIGS / "fusion.yaml").read_text(encoding="utf-8"), tmp_path / "fusion.yaml"
    assert old in text
    path.write_text(changed := text.replace(old, new), encoding="utf-8")
    section, kind = ("cf", Collaborative) if "tolerance" in old else ("fused-align", Alignment)
    line = changed[:changed.index(new.splitlines()[-1])].count("\n") + 1
    with refused(ConfigError, f"{path}:{line}") as raised:
        load_section(path, section, kind)
    assert mentions(f"{raised.value.what} {raised.value.why}", *named)


@pytest.mark.parametrize(("old", "new", "named"), [
    ("  patience: 10", "  # gone", "patience"), ("fused-align:", "fused:", "'fused-align'")])
def test_a_missing_hyperparameter_or_section_is_an_error(tmp_path, old, new, named):
    text, path = (CONFIGS / "fusion.yaml").read_text(encoding="utf-8"), tmp_path / "fusion.yaml"
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with refused(ConfigError, path, names=[named]):
        load_section(path, "fused-align", Alignment)


def run(cwd: Path, *flags: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", str(ROOT / "dataloader" / "5_fusion_embeddings.sh"), *flags], cwd=cwd,
                          env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_script_runs_from_any_folder(tmp_path):
    options = shop(tmp_path / "data", random_parts(), "--fusion_parts", "td,cf")
    (tmp_path / "elsewhere").mkdir()
    for cwd, flags, made in ((ROOT / "dataloader", (), "fused-concat"),
                             (tmp_path / "elsewhere", ("--suffix=fused-pca", "--fusion_dim=4"), "fused-pca")):
        finished = run(cwd, "--data_root", str(tmp_path / "data"), "--fusion_parts", "td,cf", *flags)
        assert finished.returncode == 0, finished.stderr
        assert any(mentions(line, options.folder.embeddings(made), 8) for line in finished.stdout.splitlines())
        command = load_meta(options.folder.embeddings(made), "")["command"]
        assert command.startswith(f"{COMMAND} --data_root {tmp_path / 'data'}")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_a_failed_script_leaves_the_existing_vectors(tmp_path):
    options = shop(tmp_path, random_parts())
    fused(options)
    before = options.folder.embeddings("fused-concat").read_bytes()
    sizes = [options.folder.embeddings(suffix).stat().st_size for suffix in ("td", "image")]
    shutil.copy(options.folder.embeddings("td"), options.folder.embeddings("image"))
    meta = json.loads(meta_path(options.folder.embeddings("image")).read_text())
    meta_path(options.folder.embeddings("image")).write_text(json.dumps({**meta, "items_sha256": "0" * 64}))
    finished = run(tmp_path, "--data_root", str(tmp_path))
    outcome = Outcome(finished.returncode, finished.stdout, finished.stderr)
    outcome.check_error(ArtifactError, options.folder.embeddings("image"), names=sizes, fix=["--force"])
    assert options.folder.embeddings("fused-concat").read_bytes() == before

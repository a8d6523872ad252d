"""The whole job on a tiny data set: embeddings, codes, report, what a second run reuses."""

import json

import numpy as np
import pytest
import torch

from common.artifacts import DatasetFolder, load_codes
from common.command import run_command
from common.errors import ConfigError, TrainingError
from common.run import latest_run
from quantization import pipeline
from quantization.export import export
from quantization.models import find_class

from .conftest import NUM_ITEMS, WIDTH
from .tiny_data import save_embedding, save_interactions, save_items


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("common.publishing._sync", lambda path: None)


@pytest.fixture
def folder(tmp_path, xs) -> DatasetFolder:
    folder = save_items(DatasetFolder(tmp_path / "data", "Tiny"), NUM_ITEMS)
    save_embedding(folder, "td", xs.numpy())
    save_interactions(folder, [(user, (3 * user + step) % NUM_ITEMS, split) for user in range(20)
                               for step, split in enumerate(["train", "train", "train", "valid", "test"])])
    return folder


@pytest.fixture
def quantize(tmp_path, folder, make_config):
    """name, key=value, ... -> the finished run; `common` holds keys of that section, the rest are small sizes."""
    def quantize(name, strict=False, force=False, suffix="td", tag=None, common=None, **own):
        config = make_config(name, **own)
        config["common"].update({"device": "cpu"} | (common or {}))
        options = pipeline.Options(tmp_path / "runs", suffix, tag, force, strict)
        pipeline.train(config, folder, options, f"quantize {name}")
        return latest_run(tmp_path / "runs/quantization/Tiny" / "-".join(filter(None, (name, suffix, tag))))

    return quantize


def test_a_model_key_that_nobody_reads_is_an_error_before_training(tmp_path, folder, make_config):
    config = make_config("rqvae")
    config["rqvae"]["model_params"]["hiden_sizes"] = 3
    with pytest.raises(ConfigError, match="unused key rqvae.model_params.hiden_sizes. did you mean 'hidden_sizes'"):
        pipeline.train(config, folder, pipeline.Options(tmp_path / "runs", "td", None, False, False), "a command")
    assert not (tmp_path / "runs").exists()


def test_an_exception_in_training_names_its_line_and_method(quantize, tmp_path, monkeypatch, capsys):
    class Failing(find_class("rqvae")):
        def compute_loss(self, forward_outputs, original_xs):
            if self.training:
                raise ValueError("two widths")
            return super().compute_loss(forward_outputs, original_xs)

    monkeypatch.setattr(pipeline, "find_class", lambda name: Failing)
    monkeypatch.setattr("common.command.plug_in_files", {__file__})
    assert run_command(lambda argv: quantize("rqvae"), []) == 2
    said, line = capsys.readouterr().err, Failing.compute_loss.__code__.co_firstlineno + 2
    assert f"error: {__file__}:{line}: " in said
    assert "Failing.compute_loss raised ValueError. two widths." in said
    assert "Traceback" not in said
    [log] = tmp_path.glob("runs/quantization/Tiny/rqvae-td/*/run.log")
    assert "Traceback" in log.read_text()


def test_a_run_leaves_codes_figures_verdicts_and_a_summary(quantize, folder, capsys):
    run = quantize("rkmeans")
    codes, meta = load_codes(folder, "rkmeans", "td", None)
    summary = json.loads((run / "finished.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert (meta["run"], meta["quantizer"]) == (run.name, "rkmeans")
    assert summary["codebook_sizes"] == meta["codebook_sizes"]
    assert summary["figures"] == evaluation["figures"]
    assert {"collision_rate", "prefix_similarity", "behavioural_coherence"} <= set(summary["figures"])
    assert summary["collision_rate_before"] == meta["collision_rate_before"] == summary["figures"]["collision_rate"]
    assert summary["collision_rate_after"] == 0.0
    assert summary["num_parameters"] == 0
    out = capsys.readouterr().out
    assert all(f"  {line}" in out for line in evaluation["verdicts"])
    assert len(codes) == NUM_ITEMS


@pytest.mark.slow
def test_what_is_published_is_reused_until_it_is_forced_or_gone(quantize, folder, capsys):
    quantize("pq")
    path = folder.codes("pq", "td", None)
    published, written = path.read_bytes(), path.stat().st_mtime_ns
    quantize("pq")
    assert "reusing" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == written
    path.unlink()
    quantize("pq")
    assert path.read_bytes() == published
    quantize("pq", force=True)
    assert "reusing" not in capsys.readouterr().out
    assert path.read_bytes() == published


def test_another_option_is_another_run_and_a_tag_keeps_both(quantize, folder):
    plain, tagged = quantize("pq"), quantize("pq", tag="two", num_levels=2)
    assert plain.name != tagged.name
    assert load_codes(folder, "pq", "td", None)[1]["codebook_sizes"][:3] == [4, 4, 4]
    assert load_codes(folder, "pq", "td", "two")[1]["codebook_sizes"][:2] == [4, 4]


EQUAL = np.full((NUM_ITEMS, WIDTH), 0.1)  # leaves one code of four in use


def test_a_collapse_is_a_warning_with_three_keys_to_try_and_codes_are_written(quantize, folder, capsys):
    save_embedding(folder, "td", EQUAL)
    quantize("rvq")
    captured = capsys.readouterr()
    assert "WARNING: the codebooks have collapsed: level 1 uses 25% of its codes" in captured.err
    assert captured.err.count("--") == 3
    assert "likely collapse" in captured.out
    assert load_codes(folder, "rvq", "td", None)[0][:, -1].tolist() == list(range(NUM_ITEMS))


@pytest.mark.slow
def test_a_collapse_is_an_error_where_it_is_taken_strictly_and_no_codes_are_written(quantize, folder, tmp_path):
    save_embedding(folder, "td", EQUAL)
    with pytest.raises(TrainingError, match="level 1 uses 25% of its codes.* no --strict") as raised:
        quantize("rvq", strict=True)
    assert raised.value.exit_code == 6
    assert not folder.codes("rvq", "td", None).exists()
    assert not list(tmp_path.rglob("finished.json"))
    assert "likely collapse" in next(tmp_path.rglob("evaluation.json")).read_text()  # to look into
    quantize("rvq")  # the same run without the flag
    assert folder.codes("rvq", "td", None).exists()


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["td", "interactions"])
def test_figures_are_made_again_where_what_the_codes_are_judged_by_has_changed(quantize, folder, xs, capsys, changed):
    save_embedding(folder, "other", xs.numpy())
    before = json.loads((quantize("rkmeans", suffix="other") / "evaluation.json").read_text())["figures"]
    if changed == "td":
        save_embedding(folder, "td", xs.numpy() ** 2)
    else:
        save_interactions(folder, [(user, item, "train") for user in range(5) for item in (user, user + 7)])
    after = json.loads((quantize("rkmeans", suffix="other") / "evaluation.json").read_text())["figures"]
    assert "reusing" not in capsys.readouterr().out
    assert after["collision_rate"] == before["collision_rate"]
    figure = {"td": "prefix_similarity", "interactions": "behavioural_coherence"}[changed]
    assert after[figure] != before[figure]


@pytest.mark.slow
def test_a_collapsed_run_that_is_reused_is_an_error_too_where_it_is_taken_strictly(quantize, folder):
    save_embedding(folder, "td", EQUAL)
    quantize("rvq")
    with pytest.raises(TrainingError, match="level 1 uses 25% of its codes"):
        quantize("rvq", strict=True)


def test_what_counts_as_a_collapse_may_be_set(quantize, folder, capsys):
    save_embedding(folder, "td", EQUAL)
    quantize("rvq", strict=True, common={"min_utilization": 0.25})
    assert "WARNING" not in capsys.readouterr().err


def test_no_collapse_is_no_error_where_it_is_taken_strictly(quantize, folder):
    quantize("pq", strict=True)
    assert folder.codes("pq", "td", None).exists()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [lambda xs: xs[:, :1] * torch.ones(WIDTH), lambda xs: xs[torch.arange(len(xs)) // 30]],
                         ids=["rank 1", "two vectors"])
def test_degenerate_embeddings_go_through_the_whole_job(quantize, folder, xs, rows):
    save_embedding(folder, "td", rows(xs).numpy())
    run = quantize("fsq", epochs=1)
    assert load_codes(folder, "fsq", "td", None)[1]["collision_rate_after"] == 0
    assert "NaN" not in (run / "finished.json").read_text()


def test_codes_that_items_share_come_with_a_warning_of_what_they_are_not_good_for(quantize, capsys):
    quantize("pq", num_levels=1, common={"disambiguation": "none"})
    assert "no recommender takes these codes" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_exported_and_imported_again_gives_the_same_codes(quantize, folder, tmp_path):
    quantize("rkmeans")
    codes, meta = load_codes(folder, "rkmeans", "td", None)
    index, _ = export(folder, "rkmeans", "td", None, tmp_path / "out")
    first = quantize("imported", file=index)
    imported, again = load_codes(folder, "imported", "td", None)
    assert imported.tolist() == codes.tolist()
    assert again["disambiguation_level"] is None
    assert list(again["made_from"]) == [str(index)]
    index.write_text(index.read_text().replace("\n", "\n\n"))
    assert quantize("imported", file=index).name != first.name  # another content is another run


def test_an_embedding_that_cannot_be_cut_is_an_error_with_both_numbers_before_a_run_is_made(quantize, tmp_path):
    with pytest.raises(ConfigError, match=f"pq.model_params.num_levels: is 4. .* {WIDTH} columns") as raised:
        quantize("pq", num_levels=4)
    assert raised.value.fix == "one of 1, 2, 3, 6"
    assert not (tmp_path / "runs").exists()


def test_more_codewords_than_items_are_an_error_with_both_numbers(quantize):
    with pytest.raises(ConfigError, match=f"codebook_size: is 41. there are only {NUM_ITEMS} items"):
        quantize("pq", codebook_size=NUM_ITEMS + 1)

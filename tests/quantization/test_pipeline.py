"""The whole job on a tiny dataset: embeddings, codes, report, and reuse by a second run."""

import json
import logging

import numpy as np
import pytest
import torch

from common.artifacts import DatasetFolder, dataset_line, load_codes
from common.command import run_command
from common.errors import ConfigError, TrainingError
from common.run import latest_run
from quantization import pipeline
from quantization.export import export
from quantization.models import find_class
from tests.errors import Outcome, refused

from .conftest import NUM_ITEMS, WIDTH, numbers
from .tiny_data import save_embedding, save_interactions, save_items, save_users


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("common.publishing._sync", lambda path: None)


@pytest.fixture
def folder(tmp_path, xs) -> DatasetFolder:
    folder = save_items(DatasetFolder(tmp_path / "data", "Tiny"), NUM_ITEMS)
    save_users(folder, [f"user {user}" for user in range(20)])
    save_embedding(folder, "td", xs.numpy())
    save_interactions(folder, [(user, (3 * user + step) % NUM_ITEMS, split) for user in range(20)
                               for step, split in enumerate(["train", "train", "train", "valid", "test"])])
    return folder


@pytest.fixture
def quantize(tmp_path, folder, make_config):
    """name, key=value, ... -> the finished run; `common` updates that section, `own` the small sizes."""
    def quantize(name, strict=False, force=False, suffix="td", tag=None, common=None, **own):
        config = make_config(name, **own)
        config["common"].update({"device": "cpu"} | (common or {}))
        options = pipeline.Options(tmp_path / "runs", suffix, tag, force, strict)
        pipeline.train(config, folder, options, f"quantize {name}")
        return latest_run(tmp_path / "runs/quantization/Tiny" / "-".join(filter(None, (name, suffix, tag))))

    return quantize


def test_an_unused_model_key_is_refused_before_training(tmp_path, folder, make_config):
    config = make_config("rqvae")
    config["rqvae"]["model_params"]["hiden_sizes"] = 3
    with refused(ConfigError, "rqvae.model_params.hiden_sizes", names=["'hidden_sizes'"]):
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
    outcome = Outcome(run_command(lambda argv: quantize("rqvae"), []), *capsys.readouterr())
    line = Failing.compute_loss.__code__.co_firstlineno + 2
    outcome.check_error(ConfigError, f"{__file__}:{line}", names=["Failing.compute_loss", "ValueError", "two widths"],
                        fix=["--debug"])
    [log] = tmp_path.glob("runs/quantization/Tiny/rqvae-td/*/run.log")
    assert "Traceback" in log.read_text()


def test_a_run_writes_codes_metrics_diagnostics_and_a_summary(quantize, folder, capsys):
    run = quantize("rkmeans")
    codes, meta = load_codes(folder, "rkmeans", "td", None)
    summary = json.loads((run / "finished.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert (meta["run"], meta["quantizer"]) == (run.name, "rkmeans")
    assert summary["codebook_sizes"] == meta["codebook_sizes"]
    assert summary["metrics"] == evaluation["metrics"]
    assert {"collision_rate", "prefix_similarity", "behavioral_coherence"} <= set(summary["metrics"])
    assert summary["collision_rate_before"] == meta["collision_rate_before"] == summary["metrics"]["collision_rate"]
    assert summary["collision_rate_after"] == 0.0
    assert summary["num_parameters"] == 0
    out = capsys.readouterr().out
    assert all(line in out for line in evaluation["diagnostics"])
    assert len(codes) == NUM_ITEMS


@pytest.mark.slow
def test_published_codes_are_reused_until_forced_or_removed(quantize, folder):
    run = quantize("pq")
    paths = [folder.codes("pq", "td", None), run / "finished.json"]
    published = paths[0].read_bytes()

    def written() -> list[int]:
        return [path.stat().st_mtime_ns for path in paths]

    first = written()
    assert quantize("pq") == run
    assert written() == first
    paths[0].unlink()
    assert quantize("pq") == run
    assert paths[0].read_bytes() == published
    again = written()
    assert quantize("pq", force=True) == run
    assert all(new > old for new, old in zip(written(), again, strict=True))
    assert paths[0].read_bytes() == published


def test_a_tag_keeps_the_codes_of_another_run(quantize, folder):
    plain, tagged = quantize("pq"), quantize("pq", tag="two", num_levels=2)
    assert plain.name != tagged.name
    assert load_codes(folder, "pq", "td", None)[1]["codebook_sizes"][:3] == [4, 4, 4]
    assert load_codes(folder, "pq", "td", "two")[1]["codebook_sizes"][:2] == [4, 4]


EQUAL = np.full((NUM_ITEMS, WIDTH), 0.1)  # leaves one code of four in use


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def advice(run) -> list[str]:
    """The diagnostics of a run that suggest flags for levels with 25% of their codes in use."""
    lines = json.loads((run / "evaluation.json").read_text())["diagnostics"]
    return [line for line in lines if "25%" in numbers(line) and "--" in line]


def test_a_collapse_is_a_warning_with_three_suggestions(quantize, folder, capsys, caplog):
    save_embedding(folder, "td", EQUAL)
    run = quantize("rvq")
    [warning] = warnings(caplog)
    captured = capsys.readouterr()
    assert captured.err == f"{warning}\n"
    assert {"1", "25%"} <= set(numbers(warning))
    assert warning.count("--") == 3
    assert advice(run)[0] in captured.out
    assert dataset_line(folder) in captured.out
    codes, meta = load_codes(folder, "rvq", "td", None)
    assert meta["collapse"] in warning
    assert codes[:, -1].tolist() == list(range(NUM_ITEMS))


@pytest.mark.slow
def test_a_strict_collapse_publishes_no_codes(quantize, folder, tmp_path):
    save_embedding(folder, "td", EQUAL)
    with refused(TrainingError, names=["1", "25%"], fix=["--strict"]) as raised:
        quantize("rvq", strict=True)
    assert not folder.codes("rvq", "td", None).exists()
    assert not list(tmp_path.rglob("finished.json"))
    assert advice(raised.value.where)  # it shows the cause
    assert quantize("rvq") == raised.value.where  # the same run without the flag
    assert folder.codes("rvq", "td", None).exists()


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["td", "interactions"])
def test_changed_reference_data_updates_the_metrics(quantize, folder, xs, changed):
    save_embedding(folder, "other", xs.numpy())
    first = quantize("rkmeans", suffix="other")
    before = json.loads((first / "evaluation.json").read_text())["metrics"]
    if changed == "td":
        save_embedding(folder, "td", xs.numpy() ** 2)
    else:
        save_interactions(folder, [(user, item, "train") for user in range(20) for item in (user % 5, user % 5 + 7)])
    second = quantize("rkmeans", suffix="other")
    after = json.loads((second / "evaluation.json").read_text())["metrics"]
    assert second != first
    assert after["collision_rate"] == before["collision_rate"]
    metric = {"td": "prefix_similarity", "interactions": "behavioral_coherence"}[changed]
    assert after[metric] != before[metric]


@pytest.mark.slow
def test_a_reused_collapsed_run_is_refused_if_strict(quantize, folder):
    save_embedding(folder, "td", EQUAL)
    run = quantize("rvq")
    with refused(TrainingError, run, names=["1", "25%"], fix=["--strict"]):
        quantize("rvq", strict=True)


def test_min_utilization_sets_the_limit_of_a_collapse(quantize, folder, caplog):
    save_embedding(folder, "td", EQUAL)
    quantize("rvq", strict=True, common={"min_utilization": 0.25})
    assert not warnings(caplog)


def test_strict_accepts_a_run_without_collapse(quantize, folder):
    quantize("pq", strict=True)
    assert folder.codes("pq", "td", None).exists()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [lambda xs: xs[:, :1] * torch.ones(WIDTH), lambda xs: xs[torch.arange(len(xs)) // 30]],
                         ids=["rank 1", "two vectors"])
def test_degenerate_embeddings_pass_the_whole_job(quantize, folder, xs, rows):
    save_embedding(folder, "td", rows(xs).numpy())
    run = quantize("fsq", epochs=1)
    assert load_codes(folder, "fsq", "td", None)[1]["collision_rate_after"] == 0
    assert "NaN" not in (run / "finished.json").read_text()


def test_shared_codes_are_a_warning_with_a_flag(quantize, capsys):
    quantize("pq", num_levels=1, common={"disambiguation": "none"})
    [warning] = capsys.readouterr().err.splitlines()
    assert "--disambiguation extra_level" in warning


@pytest.mark.slow
def test_exported_and_imported_codes_are_the_same(quantize, folder, tmp_path):
    quantize("rkmeans")
    codes, meta = load_codes(folder, "rkmeans", "td", None)
    index, *_ = export(folder, "rkmeans", "td", None, tmp_path / "out")
    first = quantize("imported", file=index)
    imported, again = load_codes(folder, "imported", "td", None)
    assert imported.tolist() == codes.tolist()
    assert again["disambiguation_level"] is None
    assert list(again["made_from"]) == [str(index)]
    index.write_text(index.read_text().replace("\n", "\n\n"))
    assert quantize("imported", file=index).name != first.name  # other content gives another run


def test_an_embedding_that_cannot_be_split_is_refused(quantize, tmp_path):
    with refused(ConfigError, "pq.model_params.num_levels") as raised:
        quantize("pq", num_levels=4)
    assert {"4", str(WIDTH)} <= set(numbers(f"{raised.value.what} {raised.value.why}"))
    assert numbers(raised.value.fix) == ["1", "2", "3", "6"]
    assert not (tmp_path / "runs").exists()


def test_more_codewords_than_items_are_refused(quantize):
    with refused(ConfigError, "pq.model_params.codebook_size", names=[NUM_ITEMS + 1, NUM_ITEMS],
                 fix=["--codebook_size auto"]):
        quantize("pq", codebook_size=NUM_ITEMS + 1)

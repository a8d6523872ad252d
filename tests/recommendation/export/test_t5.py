"""Weights exported to transformers' T5 and imported again; transformers' own search as the oracle of ours."""

import errno
import json
import logging
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers  # it imports each model when it is first used

from common.artifacts import DatasetFolder, save_array
from common.cli import ROOT
from common.errors import ArtifactError, ConfigError, DataError
from recommendation.export.t5 import NOT_THE_SAME, WITHOUT_PRIOR, export_t5
from recommendation.inputs import Choice
from recommendation.models.encoder_decoder.t5 import load_t5, read_t5, to_t5
from recommendation.options import read_flags
from recommendation.pipeline import Pipeline
from tests.errors import Outcome, refused
from tests.text import lines_with

from ..conftest import NUM_ITEMS, SIZES, random_codes, randomize, windows_of
from ..models.test_encoder_decoder import TOKEN_OFFSETS
from ..models.test_generator import HISTORIES
from ..test_pipeline import HISTORIES as USERS
from ..test_pipeline import RAW_ITEMS, write_data

CHOICE = Choice("encoder_decoder")
FILES = {"config.json", "generation_config.json", "model.safetensors", "index.json", "README.md"}
BOTH = pytest.mark.parametrize("train_on", ["target", "every_position"])


@pytest.fixture
def make(make_model):
    """train_on, key=value, ... -> an encoder-decoder in evaluation mode, with large biases."""
    def make(train_on: str = "target", **own: object):
        model = make_model("encoder_decoder", train_on=train_on, **own).eval()
        randomize(model)
        return model

    return make


class SliceOfLevel:
    """Normalize log-probabilities over the level's own tokens instead of the whole vocabulary."""

    def __call__(self, prefixes, scores):
        level = prefixes.shape[1] - 1  # the start token is first
        first, last = TOKEN_OFFSETS[level], TOKEN_OFFSETS[level] + SIZES[level]
        inside = torch.full_like(scores, float("-inf"))
        inside[:, first:last] = scores[:, first:last].log_softmax(dim=1)
        return inside


def allowed_tokens(catalogue):
    """The function that transformers calls for each beam: the tokens that continue an item's ID."""
    rows = (catalogue.codes + torch.tensor(TOKEN_OFFSETS)).tolist()

    def allowed(_, prefix):
        begun = prefix[1:].tolist()
        return sorted({row[len(begun)] for row in rows if row[:len(begun)] == begun}) or [0]

    return allowed


def search(t5, catalogue, history: list[int], **own) -> tuple[list[int], list[float]]:
    """All items in the order of transformers' beam search, and their scores."""
    tokens = catalogue.codes + torch.tensor(TOKEN_OFFSETS)
    item_of = {tuple(row): item for item, row in enumerate(tokens.tolist())}
    input_ids = tokens[history].view(1, -1)
    output = t5.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), num_beams=NUM_ITEMS,
                         num_return_sequences=NUM_ITEMS, max_new_tokens=3, length_penalty=0.0, do_sample=False,
                         return_dict_in_generate=True, output_scores=True, **own)
    items = [item_of[tuple(row)] for row in output.sequences[:, 1:].tolist()]
    return items, output.sequences_scores.tolist()


@torch.no_grad()
def test_transformers_search_ranks_and_scores_the_items_equally(make, catalogue):
    model = make(num_beams=NUM_ITEMS, normalize_over="codebook")
    t5 = to_t5(model)
    # The slice comes before the constraint, because our softmax includes the codes that no item has.
    existing = transformers.PrefixConstrainedLogitsProcessor(allowed_tokens(catalogue), NUM_ITEMS)
    processors = transformers.LogitsProcessorList([SliceOfLevel(), existing])
    for history in HISTORIES:
        ours = model.recommend(windows_of(history), NUM_ITEMS)
        items, scores = search(t5, catalogue, history, logits_processor=processors, renormalize_logits=False)
        assert items == ours.items[0].tolist()
        assert scores == pytest.approx(ours.scores[0].tolist(), abs=1e-4)


@torch.no_grad()
def test_with_only_the_constraint_transformers_agrees_over_existing_codes(make, catalogue):
    model = make(num_beams=NUM_ITEMS, normalize_over="valid_items")
    t5 = to_t5(model)
    for history in HISTORIES:
        ours = model.recommend(windows_of(history), NUM_ITEMS)
        items, scores = search(t5, catalogue, history, prefix_allowed_tokens_fn=allowed_tokens(catalogue))
        assert items == ours.items[0].tolist()
        assert scores == pytest.approx(ours.scores[0].tolist(), abs=1e-4)


def test_the_config_describes_the_model(make):
    config = to_t5(make(dropout=0.1)).config.to_dict()
    wanted = {"vocab_size": 13, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2,
              "num_heads": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
              "dropout_rate": 0.1, "feed_forward_proj": "relu", "tie_word_embeddings": False, "pad_token_id": 0,
              "decoder_start_token_id": 0, "eos_token_id": None,
              "semantic_ids": {"train_on": "target", "encoder_mask": "full", "codebook_sizes": SIZES}}
    assert {key: config[key] for key in wanted} == wanted


@pytest.mark.parametrize("num_beams", [1, 10])
def test_a_saved_t5_is_loaded_with_its_own_head(make, tmp_path, num_beams):
    t5 = to_t5(make(num_beams=num_beams))
    t5.save_pretrained(tmp_path)
    loaded = read_t5(tmp_path).eval()
    tokens = torch.tensor([[1, 5, 10]])
    assert torch.equal(loaded.lm_head.weight, t5.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.shared.weight)
    assert torch.equal(loaded(input_ids=tokens, labels=tokens).logits, t5(input_ids=tokens, labels=tokens).logits)
    assert (loaded.generation_config.num_beams or 1) == num_beams


@BOTH
@torch.no_grad()
def test_a_saved_t5_is_loaded_as_the_same_model(make, tmp_path, train_on):
    model, other = make(train_on), make(train_on)
    for parameter in other.parameters():
        parameter.add_(1.0)
    to_t5(model).save_pretrained(tmp_path)
    load_t5(other, read_t5(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@torch.no_grad()
def test_a_t5_built_by_transformers_is_loaded(make, catalogue):
    torch.manual_seed(3)
    config = to_t5(make()).config.to_dict()
    del config["semantic_ids"]
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).eval()
    t5.lm_head.weight = torch.nn.Parameter(torch.randn(13, 16))
    model = make(num_beams=NUM_ITEMS, normalize_over="valid_items")
    load_t5(model, t5)
    items, _ = search(t5, catalogue, HISTORIES[0], prefix_allowed_tokens_fn=allowed_tokens(catalogue),
                      renormalize_logits=True)
    assert items == model.recommend(windows_of(HISTORIES[0]), NUM_ITEMS).items[0].tolist()


@torch.no_grad()
def test_without_a_memory_bias_in_t5_it_starts_at_zero(make, caplog):
    target, model = make("target"), make("every_position")
    with caplog.at_level(logging.INFO):
        load_t5(model, to_t5(target))
    assert (model.memory_bias.weight == 0).all()
    [message] = caplog.messages
    masks = [one.properties()["encoder_mask"] for one in (target, model)]
    assert masks == ["full", "causal by item"]
    assert all(mask in message for mask in masks)


@pytest.mark.parametrize(("change", "key", "values"), [
    ({"d_model": 12}, "d_model", [12, 16]),
    ({"num_decoder_layers": 1}, "num_decoder_layers", [1, 2]),
    ({"vocab_size": 32128}, "vocab_size", [32128, 13]),
    ({"feed_forward_proj": "gated-gelu"}, "feed_forward_proj", ["'gated-gelu'", "'relu'"]),
    ({"tie_word_embeddings": True}, "scale_decoder_outputs", [True, False]),
    ({"semantic_ids": {"codebook_sizes": [5, 4, 3]}}, "codebook_sizes", [[5, 4, 3], SIZES]),
    ({"semantic_ids": {"memory_bias": [[0.0]]}}, "memory_bias", [[1, 1], [8, 2]]),
])
def test_a_t5_that_does_not_fit_is_refused(make, change, key, values):
    model = make("every_position")
    config = to_t5(model).config.to_dict() | change
    config.pop("scale_decoder_outputs")
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    with refused(ConfigError, f"T5: {key}", names=values):
        load_t5(model, t5)


@pytest.fixture
def train(tmp_path, make_config):
    """train_on, from_t5=, key=value, ... -> the finished run's folder."""
    folder = write_data(tmp_path, USERS)

    def train(train_on: str, from_t5: Path | None = None, **own) -> Path:
        config = make_config("encoder_decoder", train_on=train_on, top_k=20, **{"num_beams": NUM_ITEMS} | own)
        pipeline = Pipeline(config, folder, CHOICE, tmp_path / "runs", "train", from_t5)
        pipeline.execute(force=False)
        return pipeline.run.folder

    return train


@pytest.fixture
def export(tmp_path, train, caplog):
    """train_on -> the exported folder, and the messages of the export."""
    def export(train_on: str = "target", *flags: str, **keys) -> tuple[Path, list[str]]:
        train(train_on, **keys)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            read_flags([f"--export_t5={tmp_path / 'out'}", *flags])
            export_t5(DatasetFolder(tmp_path / "data", "Tiny"), CHOICE, tmp_path / "runs", tmp_path / "out")
        return tmp_path / "out", [one.getMessage() for one in caplog.records if one.name == export_t5.__module__]

    return export


def lists(run: Path) -> list:
    return [json.loads(line)["items"] for line in (run / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_export_has_all_files_for_other_programs(export, tmp_path):
    target, [message] = export()
    assert {path.name for path in target.iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs", "out"}
    tokens = random_codes(NUM_ITEMS, SIZES) + torch.tensor(TOKEN_OFFSETS)
    assert json.loads((target / "index.json").read_text()) == dict(zip(RAW_ITEMS, tokens.tolist(), strict=True))
    assert lines_with(message, target, "full")  # the encoder's mask
    assert NOT_THE_SAME not in (target / "README.md").read_text()


@pytest.mark.slow
def test_an_export_of_every_position_warns_about_t5(export):
    target, messages = export("every_position")
    assert lines_with(NOT_THE_SAME, "every_position", "--train_on target")
    for text in ("\n".join(messages), (target / "README.md").read_text()):
        assert NOT_THE_SAME in text
        assert "causal by item" in text
    own = json.loads((target / "config.json").read_text())["semantic_ids"]
    assert (own["train_on"], own["encoder_mask"]) == ("every_position", "causal by item")


@pytest.mark.slow
def test_an_export_says_that_it_is_without_the_prior(export):
    target, messages = export("target", prior="transitions")
    for text in ("\n".join(messages), (target / "README.md").read_text()):
        assert WITHOUT_PRIOR.format("transitions") in text


@pytest.mark.slow
def test_a_model_with_one_position_per_item_is_not_exported(train, tmp_path):
    run = train("target", encoder_positions="item")
    with refused(ConfigError, f"--export_t5: {run}", names=["item"], fix=["--encoder_positions code"]):
        export_t5(DatasetFolder(tmp_path / "data", "Tiny"), CHOICE, tmp_path / "runs", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 5])
def test_the_exports_readme_program_shows_ten_items_with_few_beams(export, monkeypatch, capsys, tmp_path, num_beams):
    target, _ = export(num_beams=num_beams)
    monkeypatch.chdir(target)
    [program] = re.findall(r"```python\n(.*?)```", (target / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    runpy.run_path(str(tmp_path / "program.py"))
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert len(set(shown)) == min(10, NUM_ITEMS)
    assert set(shown) <= set(RAW_ITEMS)


@pytest.mark.slow
def test_the_exports_readme_program_recommends_as_the_run(export, train, monkeypatch, capsys, tmp_path):
    target, _ = export()
    monkeypatch.chdir(target)
    [program] = re.findall(r"```python\n(.*?)```", (target / "README.md").read_text(), flags=re.DOTALL)
    user = USERS[0]
    program = program.replace("list(index)[:3]", repr([RAW_ITEMS[item] for item in user[:-1]]))
    (tmp_path / "program.py").write_text(program)
    runpy.run_path(str(tmp_path / "program.py"))
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    run = train("target", normalize_over="valid_items", from_t5=target, lr=0.0)
    assert shown == lists(run)[0][:10]


@pytest.mark.slow
@BOTH
def test_an_imported_model_without_training_recommends_the_same(export, train, train_on):
    target, _ = export(train_on)
    first, again = train(train_on), train(train_on, from_t5=target, lr=0.0, epochs=1)
    assert lists(again) == lists(first)
    other = train(train_on, lr=0.0, epochs=1)
    assert other != again
    assert lists(other) != lists(first)


@pytest.mark.slow
def test_the_initial_weights_are_among_a_runs_inputs(export, train):
    target, _ = export()
    run = train("target", from_t5=target)
    inputs = json.loads((run / "finished.json").read_text())["inputs"]
    assert {"from_t5/model.safetensors", "from_t5/config.json"} <= set(inputs)
    t5 = read_t5(target)
    torch.nn.init.ones_(t5.lm_head.weight)
    t5.save_pretrained(target)
    assert train("target", from_t5=target) != run


@pytest.mark.slow
def test_semantic_ids_that_differ_from_the_export_are_counted(export, train, caplog):
    target, _ = export()
    path = target / "index.json"
    index = json.loads(path.read_text())
    first, second = list(index)[:2]
    path.write_text(json.dumps(index | {first: index[second]}))
    caplog.clear()
    train("target", from_t5=target)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(path) in warning
    assert lines_with(warning.replace(str(path), ""), 29, 30)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{", "[]", "7"])
def test_an_invalid_index_is_refused(export, train, content):
    target, _ = export()
    (target / "index.json").write_text(content)
    with refused(ArtifactError, target / "index.json", fix=["index.json", "--export_t5"]):
        train("target", from_t5=target)


@pytest.mark.slow
def test_an_export_replaces_only_an_export_and_with_force(export):
    target, _ = export()
    with refused(ConfigError, f"--export_t5 {target}", fix=["--force"]):
        export()
    assert export("target", "--force")[0] == target
    (target / "thesis.tex").write_text("x")
    with refused(ConfigError, f"--export_t5 {target}", names=["thesis.tex"]):
        export("target", "--force")
    assert {path.name for path in target.iterdir()} == {*FILES, "thesis.tex"}
    (target / "thesis.tex").unlink()
    ours = (target / "README.md").read_text()
    (target / "README.md").write_text("# My model\n")
    with refused(ConfigError, f"--export_t5 {target}", names=["README.md"]):
        export("target", "--force")
    (target / "README.md").write_text(ours)
    (target / "generation_config.json").unlink()
    (target / "generation_config.json").mkdir()
    with refused(ConfigError, f"--export_t5 {target}", names=["generation_config.json"]):
        export("target", "--force")
    (target / "generation_config.json").rmdir()
    for name in ("index.json",):  # without index.json, it could be a downloaded T5
        (target / name).unlink()
    with refused(ConfigError, f"--export_t5 {target}", names=["index.json"]):
        export("target", "--force")
    assert (target / "model.safetensors").exists()


@pytest.mark.slow
def test_a_failed_export_leaves_no_files(export, monkeypatch, tmp_path):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.T5ForConditionalGeneration, "save_pretrained", fail)
    with pytest.raises(OSError, check=lambda error: error.errno == errno.ENOSPC):
        export()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs"}


def test_an_export_without_a_run_gives_the_training_command(tmp_path):
    folder, runs = write_data(tmp_path, USERS), tmp_path / "runs"
    command = (f"python recommendation/main.py --model=encoder_decoder --category=Tiny --run_root {runs} "
               f"--data_root {folder.data_root}")
    with refused(DataError, runs / "recommendation/Tiny/encoder_decoder/rqvae-td", fix=[command]):
        export_t5(folder, CHOICE, runs, tmp_path / "out")


@pytest.mark.slow
def test_a_run_of_other_codes_is_not_exported(export, train, tmp_path):
    run = train("target")
    folder = DatasetFolder(tmp_path / "data", "Tiny")
    path = folder.codes("rqvae", "td", None)
    meta = json.loads(path.with_name(path.name + ".meta.json").read_text())
    save_array(path, random_codes(NUM_ITEMS, SIZES, seed=1).numpy().astype("int32"),
               {key: meta[key] for key in meta if key not in ("sha256", "size")})
    with refused(ArtifactError, run, names=[path.name], fix=["train"]):
        export_t5(folder, CHOICE, tmp_path / "runs", tmp_path / "out")


def save(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_json", ".json")).write_text(text)
    return folder


def test_a_folder_without_a_t5_is_refused(tmp_path, train, make):
    flags = ["--category=Tiny", "--data_root", "--export_t5"]
    with refused(DataError, tmp_path / "nowhere/config.json", names=["model.safetensors"], fix=flags):
        train("target", from_t5=tmp_path / "nowhere")
    bart, half, cut = (tmp_path / name for name in ("bart", "half", "cut"))
    with refused(ConfigError, bart / "config.json", names=["'bart'", "'t5'"], fix=["--export_t5"]):
        read_t5(save(bart, config_json='{"model_type": "bart"}'))
    with refused(ArtifactError, half, fix=["--export_t5"]):
        read_t5(save(half, config_json="{"))
    to_t5(make()).save_pretrained(cut)
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-8])
    with refused(ArtifactError, cut, fix=["--export_t5"]):
        read_t5(cut)
    (cut / "model.safetensors").write_bytes(content)
    read_t5(cut)
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with refused(ArtifactError, cut, names=["encoder.block.2.", "config.json"], fix=["--export_t5"]):
        read_t5(cut)


@pytest.mark.parametrize(("flags", "where", "names", "fix"), [
    (["--model=sasrec", "--export_t5=x"], "--export_t5", ["'sasrec'"], "--model encoder_decoder"),
    (["--model=markov", "--from_t5=x"], "--from_t5", ["'markov'"], "--model encoder_decoder"),
    (["--from_t5=x", "--encoder_positions=item"], "--from_t5", ["item"], "--encoder_positions code"),
    (["--export_t5=x", "--epochs=3"], "--export_t5", [], "--epochs"),
    (["--export_t5=x", "--from_t5=x"], "--export_t5", [], "--from_t5"),
    (["--export_t5=x", "--seeds=1,2"], "--export_t5", [], "--seeds"),
    (["--export_t5=x", "--filter_seen"], "--export_t5", [], "--filter_seen")])
def test_flags_that_do_not_fit_an_export_are_refused(flags, where, names, fix):
    with refused(ConfigError, where, names=names, fix=[fix]):
        read_flags(flags)


@pytest.mark.slow
def test_the_export_command_refuses_another_model(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "recommendation/main.py", "--model=popularity",
                           f"--export_t5={tmp_path / 'out'}"], capture_output=True, text=True, check=False)
    Outcome(done.returncode, done.stdout, done.stderr).check_error(
        ConfigError, "--export_t5", names=["'popularity'"], fix=["--model encoder_decoder"])
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()

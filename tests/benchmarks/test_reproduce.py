"""benchmarks/reproduce.py: the list, the commands, the table, and one reproduction at toy size."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import reproduce
from benchmarks.reproduce import REPRODUCTIONS, RESULTS, Speed, collect, default_out, hours, listing, page, plan
from common.cli import ROOT, parse
from common.config import resolve
from common.errors import ConfigError
from dataloader.options import parse_options
from quantization import models as quantizers
from quantization.main import make_parser as quantization_parser
from recommendation.options import read_flags
from tests.end_to_end.conftest import write_baby
from tests.errors import refused
from tests.text import lines_with

NAMES = ["tiger-beauty", "tiger-toys", "rpg-beauty", "rpg-toys", "sasrec-beauty", "sasrec-toys", "letter-beauty"]


def arguments(*words: str):
    return reproduce.make_parser().parse_args(words)


def step_words(name: str, *words: str) -> dict[str, list[str]]:
    """Return title -> the command as a list of words, from the Python file or the name of the module."""
    commands = plan(REPRODUCTIONS[name], arguments(name, *words))
    return {command.title: command.as_step().command for command in commands}


def test_the_list_names_all_reproductions():
    assert list(REPRODUCTIONS) == NAMES
    rows = {name: lines_with(listing(), name)[0] for name in NAMES}
    assert [name for name, row in rows.items() if lines_with(row, "cpu")] == ["sasrec-beauty", "sasrec-toys"]
    assert [name for name, row in rows.items() if "text embedding" in row] == NAMES[:4]


def test_hours_count_training_evaluations_and_codes(monkeypatch):
    reproduction = REPRODUCTIONS["sasrec-beauty"]._replace(dataset="Tiny")
    monkeypatch.setitem(reproduce.NUM_USERS, "Tiny", 100)
    monkeypatch.setitem(reproduce.NUM_EVENTS, "Tiny", 1300)
    # 70 epochs of 1,300 - 300 targets, 35 evaluations, and two splits with two protocols at the end
    assert hours(reproduction, Speed(1000, 100, 2)) == pytest.approx(2 + (70 + 39) / 3600)


@pytest.mark.parametrize("smoke", [[], ["--max_steps=20"]])
@pytest.mark.parametrize("raw", [[], ["--raw_dir=raw"]])
@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_all_stages_accept_their_flags(name, raw, smoke, tmp_path):
    if raw:
        raw = [f"--raw_dir={tmp_path}"]
    ids = tmp_path / "letter_semantic_ids.json"
    ids.write_text("{}")
    commands = step_words(name, *raw, *smoke, f"--ids={ids}", f"--data_root={tmp_path}", f"--run_root={tmp_path}")
    if not raw:
        options = parse_options(commands["download"][4:], "")
        assert options.process.source == "amazon14"
    options = parse_options(commands["data"][4:], "")
    assert list(options.process.processing.template) == options.process.config["templates"]["full"]
    assert commands["data"][3] == "dataloader.process"
    reproduction = REPRODUCTIONS[name]
    if "text embedding" in commands:
        assert parse_options(commands["text embedding"][4:], "").text.target.suffix == reproduction.suffix
    chosen = ("rqvae", "td", None)
    if "semantic IDs" in commands:
        flags = commands["semantic IDs"][2:]
        args = parse(quantization_parser(flags), flags, open_ended=True)
        own = quantizers.config_path(args.quantizer_name)
        resolve(args.quantizer_name, args.config or own, quantizers.DEFAULTS, args.overrides, args.flags, own)
        chosen = (args.quantizer_name, args.embedding_suffix, args.tag)
    args, config = read_flags(commands["training and test"][2:])
    assert (args.quantizer_name, args.embedding_suffix, args.tag) == chosen
    assert (args.model, args.dataset) == (reproduction.model, reproduction.dataset)
    assert config.training_params["filter_seen"] is False
    if smoke:
        assert config.training_params["max_steps"] == 20


def test_a_smoke_run_or_other_flags_do_not_replace_codes_or_results():
    assert "--tag=wide" in step_words("tiger-beauty")["semantic IDs"]
    assert "--tag=wide-smoke" in step_words("tiger-beauty", "--max_steps=5")["training and test"]
    assert default_out(arguments("rpg-toys")) == RESULTS / "reproduce-rpg-toys.json"
    assert default_out(arguments("rpg-toys", "--seed=2")) == RESULTS / "reproduce-rpg-toys-seed2.json"
    for other in ("--max_steps=5", "--flags=--epochs=1"):
        assert RESULTS not in default_out(arguments("rpg-toys", other)).parents


@pytest.mark.parametrize("flag", ["--seed=5", "--max_steps=2", "--run_root=x"])
def test_flags_of_the_program_itself_are_refused(flag):
    with refused(ConfigError, "--flags", names=[flag], fix=["--seed"]):
        reproduce.main(["sasrec-beauty", f"--flags={flag}"])


@pytest.mark.parametrize("out", ["x.md", "."])
def test_a_result_that_would_lose_its_json_is_refused(out):
    with refused(ConfigError, "--out", names=[out], fix=[".json"]):
        reproduce.main(["sasrec-beauty", f"--out={out}"])


def test_unknown_names_and_missing_ids_are_refused():
    with refused(ConfigError, "tiger-beaty", names=["tiger-beauty"]):
        reproduce.main(["tiger-beaty"])
    with refused(ConfigError, "--ids", fix=["--ids"]):
        reproduce.main(["letter-beauty"])


@pytest.fixture
def finished_run(tmp_path) -> Path:
    """The files of a finished run of rpg-toys, written by hand, and the time of its quantizer."""
    run = tmp_path / "run"
    made = tmp_path / "quantization" / "Toys_and_Games" / "opq-white" / "abc"
    for folder in (run, made):
        folder.mkdir(parents=True)
    (made / "finished.json").write_text("{}")
    (made.parent / "latest").write_text("abc\n")
    (made / "times.json").write_text('{"training": 90}')
    (run / "times.json").write_text('{"training": 600, "test": 30}')
    values = dict(zip(reproduce.METRICS, (.06, .04, .09123, .05), strict=True))
    both = {"all": values, "unseen": {name: value + .01 for name, value in values.items()}}
    (run / "metrics.json").write_text(json.dumps({"alone": {"valid": both, "test": both}, "protocol": "all",
                                                  "best_epoch": 7, "num_parameters": 10}))
    (run / "finished.json").write_text(json.dumps({
        "machine": "Linux 6.1 x86_64, 8 cores, NVIDIA H100", "threads": 4, "commit": "0123456789abcdef-dirty",
        "date": "2026-12-01", "python": "3.11", "torch": "2.11"}))
    (run / "config.yaml").write_text(
        "encoder_retrieve:\n  model_params: {dropout: 0.5}\n  training_params: {precision: bfloat16, lr: 0.003, "
        "optimizer: AdamW, lr_schedule: cosine, warmup_steps: 10000, weight_decay: 0.0, batch_size: 1536, "
        "epochs: 150}\n")
    return run


def test_the_table_has_the_paper_the_reproduction_and_ours(finished_run, tmp_path):
    args = arguments("rpg-toys", f"--run_root={tmp_path}", f"--raw_dir={tmp_path}", "--flags=--precision=bfloat16")
    result = collect("rpg-toys", REPRODUCTIONS["rpg-toys"], args, finished_run)
    text = page(result)
    for values in (("paper", "all", ".0592", ".0401", ".0869", ".0490"),
                   ("cornac", "all", ".0613", ".0415", ".0898", ".0506"),
                   ("ours", "all", ".0600", ".0400", ".0912", ".0500", "12.0", "NVIDIA H100, 8 cores", "0",
                    "0123456-dirty"),
                   ("ours", "unseen", ".0700", ".0500", ".1012", ".0600")):
        assert len(lines_with(text, *values)) == 1, values
    assert result["minutes"] == {"training": 10.5, "semantic IDs": 1.5}
    assert result["valid"]["all"]["recall@10"] == .0912
    for note in ("whitened PCA", "all-MiniLM-L6-v2", "bfloat16", "10,000 warm-up steps"):
        assert any(note in line for line in result["notes"]), note
    assert str(tmp_path) not in json.dumps(result)
    assert str(ROOT) not in json.dumps(result)
    assert "python benchmarks/reproduce.py rpg-toys --flags=--precision=bfloat16" in text


def test_on_the_cpu_of_a_machine_with_a_gpu_the_device_is_the_cpu(finished_run, tmp_path):
    args = arguments("rpg-toys", f"--run_root={tmp_path}", "--device=cpu", "--max_steps=9")
    result = collect("rpg-toys", REPRODUCTIONS["rpg-toys"], args, finished_run)
    assert result["rows"][-1]["device"] == "CPU, 4 of 8 cores"
    assert "9 training steps" in result["notes"][0]


@pytest.mark.slow
def test_the_program_runs_at_toy_size_and_reuses_its_work(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    write_baby(raw)
    for file in list(raw.iterdir()):
        shutil.move(file, raw / file.name.replace("Baby", "Beauty"))
    command = [sys.executable, str(ROOT / "benchmarks" / "reproduce.py"), "sasrec-beauty", f"--raw_dir={raw}",
               f"--data_root={tmp_path / 'data'}", f"--run_root={tmp_path / 'runs'}", "--max_steps=3", "--device=cpu"]
    for repeated in (False, True):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ("reusing run" in done.stdout + done.stderr) is repeated
    result = json.loads((tmp_path / "runs" / "reproduce-sasrec-beauty-3-steps.json").read_text())
    assert [row["protocol"] for row in result["rows"] if row["system"] == "ours"] == ["all", "unseen"]
    assert (tmp_path / "runs" / "reproduce-sasrec-beauty-3-steps.md").read_text() in done.stdout

"""Tables of results: a report on chosen runs, and a comparison of all finished runs of a dataset."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Container
from pathlib import Path
from typing import TypedDict

import numpy as np

from common.artifacts import DatasetFolder, dataset_line, load_interactions, load_items, load_meta, load_users
from common.cli import Parser, add_shared_flags, add_variant_flags, check_name, parse
from common.command import run_command
from common.config import resolve
from common.errors import ArtifactError, ConfigError, DataError, UserError, one_line
from common.publishing import write_text
from common.reading import fits, parse_json, read_text, shortened
from common.run import log_to_console, read_finished, read_runs, save_comparison
from common.tables import csv_text, markdown
from recommendation.dataset import Sequences
from recommendation.metrics import columns, mean_and_deviation
from recommendation.models import DEFAULTS, baselines, config_path, names
from recommendation.runs import (
    NO_CODES,
    Choice,
    FinishedRun,
    current_inputs,
    find_run,
    read_run,
    require_same_inputs,
)

log = logging.getLogger(__name__)

NUM_USERS, NUM_HISTORY, NUM_RECOMMENDED = 3, 10, 10
_NAMES = ("model", "tokenizer", "seeds")
NOTES = ("The metrics are from the test split. Each model ranks the items of the whole catalogue. The rows are sorted "
         "by ndcg@10. For several seeds, a cell has the mean ± the standard deviation. For one seed, a cell has the "
         "value and, in brackets, the standard error. `training` is the training time in minutes. `users/s` is the "
         "number of lists per second in the test. `settings` lists the keys that differ from the model's config.yaml. "
         "`from_t5` means that the model was initialized from a T5. `earlier codes` means that the semantic IDs have "
         "changed since the run.")


def compare(folder: DatasetFolder, run_root: Path) -> str:
    """Return tables of all finished runs of a dataset, and the commands that train missing baselines.

    The tables are also written to `compare.md` and `compare.csv` in `run_root/recommendation/<dataset>/`. Runs on an
    earlier version of the interactions are not shown. Raises DataError if there is no run on the current interactions.
    """
    parent = run_root / "recommendation" / folder.name
    sha256 = load_meta(folder.interactions, folder.make_command)["sha256"]
    load_interactions(folder)  # raises an error if the meta file does not describe the file
    runs = _finished(parent, folder)
    current = [run for run in runs if run.inputs.get(folder.interactions.name) == sha256]
    if not current:
        raise DataError(parent, "has no finished run on the current interactions",
                        fix=Choice("encoder_decoder").training_command(folder, run_root))
    lines, rows = [f"# Recommenders of {folder.name}", "", dataset_line(folder), ""], []
    heads = [*_NAMES, *columns(), "parameters", "training", "users/s", "settings"]
    csv_heads = [*_NAMES, *(f"{name}{part}" for name in columns() for part in ("", "_deviation", "_stderr")),
                 "parameters", "training_seconds", "users_per_second", "settings", "filter_seen"]
    for filtered, heading in ((False, "No items filtered"), (True, "Items of the history filtered")):
        groups = _group_by_configuration([run for run in current if run.filter_seen is filtered])
        if groups:
            lines += [f"{heading} ({groups[0][0].metrics['test']['num_targets']} targets)", "",
                      markdown(heads, [row(group) for group in groups]), ""]
            rows += [csv_row(group) for group in groups]
    if len(runs) > len(current):
        lines += [f"Not shown: {len(runs) - len(current)} runs on an earlier version of the interactions.", ""]
    if missing := _missing_baselines(current, folder, run_root):
        lines += ["Commands to train the missing baselines:", "", *(f"    {command}" for command in missing), ""]
    text = "\n".join([*lines, NOTES])
    return f"{text}\n\n{save_comparison(parent, text, csv_text(csv_heads, rows))}"


def _finished(parent: Path, folder: DatasetFolder) -> list[FinishedRun]:
    """Return all readable finished runs, the oldest first."""
    finished = sorted(parent.glob("*/*/*/finished.json"), key=lambda path: (path.stat().st_mtime_ns, path))
    runs = list(read_runs((path.parent for path in finished), read_run).values())
    current = {name: _sha256(folder.path / f"{folder.name}.codes-{name}.npy") for name in {run.variant for run in runs}}
    return [run._replace(has_current_codes=run.variant == NO_CODES or current[run.variant] in run.inputs.values())
            for run in runs]


def _sha256(path: Path) -> str | None:
    try:
        return load_meta(path, "")["sha256"]
    except UserError:  # missing or stale
        return None


def _missing_baselines(runs: list[FinishedRun], folder: DatasetFolder, run_root: Path) -> list[str]:
    """Return the commands that train the missing baselines.

    Each baseline needs a run for every value of `filter_seen` that occurs in `runs`.
    """
    present = {(run.model, run.filter_seen) for run in runs}
    return [Choice(baseline).training_command(folder, run_root) + (" --filter_seen" if filtered else "")
            for filtered in sorted({run.filter_seen for run in runs}) for baseline in baselines()
            if (baseline, filtered) not in present]


def _group_by_configuration(runs: list[FinishedRun]) -> list[list[FinishedRun]]:
    """Group the runs that differ only in the seed or the device. The group with the best NDCG@10 is first.

    If several runs of a group have the same seed, only the last one is kept.
    """
    groups: dict[str, dict[int, FinishedRun]] = {}
    for run in runs:
        common = {key: value for key, value in run.config["common"].items() if key not in ("seed", "device")}
        key = json.dumps([run.model, run.variant, run.inputs, common, run.config[run.model]], sort_keys=True)
        groups.setdefault(key, {})[run.seed] = run
    return sorted(([by_seed[seed] for seed in sorted(by_seed)] for by_seed in groups.values()),
                  key=lambda group: -(_mean([run.metrics["test"].get("ndcg@10") for run in group]) or 0))


def row(runs: list[FinishedRun]) -> list[str]:
    """Return the cells of a row of the Markdown table. The runs differ only in the seed or the device."""
    run, tests, speed = runs[0], [run.metrics["test"] for run in runs], _mean([run.users_per_second for run in runs])
    return [*_names(runs), *(cell(tests, name) for name in columns()), f"{run.metrics['num_parameters']:,}",
            f"{(_mean([run.seconds for run in runs]) or 0) / 60:.1f}", f"{speed:,.0f}" if speed else "", settings(run)]


def csv_row(runs: list[FinishedRun]) -> list[str]:
    """Return the cells of one row of the CSV file, for a group of runs that differ only in the seed or the device."""
    run, tests = runs[0], [run.metrics["test"] for run in runs]
    metrics = mean_and_deviation(tests)
    values = [value for name in columns() for value in (
        metrics.get(name, {}).get("mean"), metrics.get(name, {}).get("deviation"),
        tests[0].get(f"{name}_stderr") if len(tests) == 1 else None)]
    values += [run.metrics["num_parameters"], _mean([run.seconds for run in runs]),
               _mean([run.users_per_second for run in runs])]
    return [*_names(runs), *("" if value is None else str(value) for value in values), settings(run),
            str(run.filter_seen).lower()]


def _names(runs: list[FinishedRun]) -> list[str]:
    return [runs[0].model, "" if runs[0].variant == NO_CODES else runs[0].variant,
            ", ".join(str(run.seed) for run in runs)]


def cell(tests: list[dict], name: str) -> str:
    """Return the text of a table cell for a metric.

    tests: the test metrics of one run per seed

    For several seeds: the mean and the standard deviation. For one seed: the value and the standard error in brackets.
    """
    error = tests[0].get(f"{name}_stderr") if len(tests) == 1 else None
    return _mean_cell(mean_and_deviation(tests).get(name)) + (f" (± {error:.4f})" if error is not None else "")


def settings(run: FinishedRun) -> str:
    """Return a text with the settings of a run that differ from the model's YAML, such as `lr=0.003 d_model=64`.

    The text also has `from_t5` if the model was initialized from a T5, and `earlier codes` if the semantic IDs have
    changed since the run.
    """
    own = flat(run.config[run.model])
    try:
        defaults = flat(resolve(run.model, config_path(run.model), DEFAULTS, []).values[run.model])
    except ConfigError:  # the model no longer exists
        defaults = own
    # `filter_seen` is not listed, because runs with and without it are in separate tables.
    changed = [f"{key.split('.')[-1]}={own[key]}" for key in own
               if own[key] != defaults.get(key) and not key.endswith(".filter_seen")]
    from_t5 = any(name.startswith("from_t5/") for name in run.inputs)
    origin = [word for word, holds in (("from_t5", from_t5), ("earlier codes", not run.has_current_codes)) if holds]
    return one_line(" ".join(changed + origin))


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    """Flatten nested dicts into one dict, with keys such as `a.b.c`."""
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _mean(values: list) -> float | None:
    """Return the mean of the values that are not None. Return None if all values are None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def main(argv: list[str]) -> None:
    parser = Parser(prog="recommendation.results", description="Show finished runs of a dataset in one table.")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--models", default=",".join(names()), metavar="M,M",
                      help="show the newest finished run of each of these models, in this order")
    rows.add_argument("--run_list", type=Path, default=None, metavar="FILE",
                      help="show the runs in a file that recommendation/main.py --run_list wrote")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q",
                        help="the quantizer that made the semantic IDs")
    add_shared_flags(parser)
    add_variant_flags(parser)
    args = parse(parser, argv)
    check_name("--quantizer_name", args.quantizer_name)
    log_to_console()
    folder = DatasetFolder(args.data_root, args.dataset)
    folder.require()
    text = report(folder, args.run_root, chosen_runs(args, folder))
    path = args.run_root / "recommendation" / args.dataset / "report.md"
    write_text(path, text + "\n")
    log.info("%s\n\nreport: wrote %s", text, path)


def chosen_runs(args: argparse.Namespace, folder: DatasetFolder) -> list[Path]:
    """Return the run folders that the flags select. Raises DataError if a run does not exist."""
    if args.run_list is not None:
        return _listed_runs(args.run_list, args.run_root / "recommendation" / folder.name)
    models = [*dict.fromkeys(args.models.split(","))]
    for model in models:
        config_path(model, "--models")
    return [find_run(folder, args.run_root, Choice(model, args.quantizer_name, args.embedding_suffix, args.tag))
            for model in models]


def _listed_runs(path: Path, parent: Path) -> list[Path]:
    """Return the run folders in a file of --run_list, each once.

    parent: the folder with all runs of the dataset

    Raises DataError if the file cannot be read or is empty, or if a line is not a finished run in `parent`.
    """
    fix = f"python recommendation/main.py --model=M --run_list {path}"
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(path, "cannot be read", str(error), fix) from error
    if not lines:
        raise DataError(path, "is empty", fix=fix)
    finished = {str(file.parent.resolve()): file.parent for file in parent.glob("*/*/*/finished.json")}
    for number, line in enumerate(lines, start=1):
        if os.path.abspath(line) not in finished:
            raise DataError(f"{path}:{number}", f"{shortened(line)!r} is not the folder of a finished run",
                            f"The finished runs of this dataset are in {parent}",
                            f"remove line {number}, or finish the training of the run that it names")
    return [*dict.fromkeys(finished[os.path.abspath(line)] for line in lines)]


def report(folder: DatasetFolder, run_root: Path, runs: list[Path]) -> str:
    """Return a table of the runs, and the recommendations of the last run for three users.

    Raises ArtifactError if the interactions or the semantic IDs have changed since the training. Raises DataError if
    the runs have different values of `filter_seen`.
    """
    finished = [read_run(run) for run in runs]
    for folder_of_run, run in zip(runs, finished, strict=True):
        require_same_inputs(folder_of_run, run.inputs, current_inputs(folder, run), run.command)
    names = [run.model if [other.model for other in finished].count(run.model) == 1 else
             f"{run.model} (seed {run.seed}, run {path.name})" for path, run in zip(runs, finished, strict=True)]
    if len({run.filter_seen for run in finished}) > 1:
        raise DataError(run_root, "the runs have different values of filter_seen", ", ".join(
            f"{name}: filter_seen {str(run.filter_seen).lower()}" for name, run in zip(names, finished, strict=True)),
            "run them again, all with --filter_seen or all without it")
    last = finished[-1]
    rule = "items of the history filtered" if last.filter_seen else "no items filtered"
    heading = (f"{folder.name}: metrics of the test split, ranked over the whole catalogue, {rule} "
               f"({last.metrics['test']['num_targets']} targets; standard errors in brackets)")
    rows = {name: run.metrics for name, run in zip(names, finished, strict=True)}
    return "\n".join([heading, "", table(rows), "", examples(folder, runs[-1], names[-1])])


def table(rows: dict[str, dict]) -> str:
    """Return a Markdown table of test metrics.

    rows: name of a model -> content of its metrics.json; a missing metric gives an empty cell
    """
    names = columns((5, 10), kinds=(True,))
    return markdown(("model", *names), [
        [model, *(f"{row['test'][name]:.4f} (±{row['test'][name + '_stderr']:.4f})"
                  if {name, f"{name}_stderr"} <= row["test"].keys() else "" for name in names)]
        for model, row in rows.items()])


def seeds_table(model: str, summary: dict) -> str:
    """Return a Markdown table with the mean and the standard deviation of each test metric over several seeds."""
    names = columns((5, 10), kinds=(True,))
    return markdown(("model", "seeds", *names), [[model, ", ".join(map(str, summary["seeds"])), *(
        _mean_cell(summary["test"].get(name)) for name in names)]])


def _mean_cell(value: dict | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.4f}" + ("" if value["deviation"] is None else f" ± {value['deviation']:.4f}")


def examples(folder: DatasetFolder, run: Path, model: str) -> str:
    """Return a text with the last ten items of the history and ten recommendations, for each of three test users."""
    items, sequences = load_items(folder), Sequences.load(folder, "cpu")
    title_of = dict(zip(items["raw_id"], items["title"], strict=True))
    tested = sequences.positions("test")  # predictions.jsonl has one line per test event, in the same order
    users, targets = load_users(folder)["raw_id"][sequences.user[tested]], items["raw_id"][sequences.item[tested]]
    parts = []
    for number, row in _predictions(run, users, targets, title_of).items():
        target = tested[number]
        events = slice(max(sequences.first[target], target - NUM_HISTORY), target)
        history = [items["title"][item] for item in sequences.item[events]]
        parts += [f"User {row['user']}: the last {len(history)} items of the history, oldest first",
                  *(f"    {title}" for title in history), f"  {model} recommends",
                  *(f"{rank:4d}. {title_of[raw_id]}{'   <- the test item' if raw_id == row['target'] else ''}"
                    for rank, raw_id in enumerate(row["items"][:NUM_RECOMMENDED], start=1)),
                  f"  the test item is: {title_of[row['target']]}", ""]
    return "\n".join(parts).rstrip()


class Prediction(TypedDict):
    """A line of predictions.jsonl."""

    user: str
    target: str
    items: list[str]


def _predictions(run: Path, users: np.ndarray, targets: np.ndarray, known: Container[str]) -> dict[int, Prediction]:
    """Return up to NUM_USERS lines of predictions.jsonl: line number from 0 -> content.

    users, targets: raw ids of the user and the item of each test event; each event has a line
    known: raw ids of all items

    Raises ArtifactError if the file is damaged.
    """
    path, num_lines, found = run / "predictions.jsonl", len(users), {}
    fix = f"{read_finished(run, f'delete {run} and train the model again')['command']} --force"
    try:
        lines = read_text(path).removesuffix("\n").split("\n")  # an id may contain other line separators
        if len(lines) != num_lines:
            raise ValueError(f"It must have {num_lines} lines, got {len(lines)}")
        for number in np.linspace(0, num_lines - 1, min(NUM_USERS, num_lines)).astype(int).tolist():
            found[number] = row = parse_json(lines[number])
            if not fits(row, Prediction) or not all(item in known for item in row["items"]):
                raise ValueError(f"Line {number + 1} is not a prediction for items of the dataset")
            if (row["user"], row["target"]) != (users[number], targets[number]):
                raise ValueError(f"Line {number + 1} is not the test event {number + 1} of the dataset")
    except (OSError, ValueError) as error:
        raise ArtifactError(path, "cannot be read", shortened(str(error)), fix) from error
    return found


if __name__ == "__main__":
    sys.exit(run_command(main))

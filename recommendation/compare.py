"""A comparison of all finished runs of a dataset."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.artifacts import DatasetFolder, dataset_line, load_interactions, load_meta
from common.config import resolve
from common.errors import ConfigError, DataError, UserError, one_line
from common.run import read_runs, save_comparison
from common.tables import csv_text, markdown
from recommendation.inputs import AUTO, NO_CODES, Choice
from recommendation.metrics import (
    CODE_HITS,
    PROTOCOLS,
    SORTED_BY,
    RankedLists,
    columns,
    mean_and_deviation,
    ndcg,
)
from recommendation.models import DEFAULTS, baselines, config_path
from recommendation.report import label_of, mean_cell
from recommendation.runs import FinishedRun, read_ranks, read_run

# R rows of a table, B test targets

HEADINGS = {"all": "All items", "unseen": "Unseen items (the items of the history are excluded)"}
NOTES = ("Each row ranks the items of the whole catalogue. The rows are sorted by the validation ndcg@10, which also "
         "selects the settings; the other metrics are from the test split. For several seeds, a cell has the mean ± "
         "the standard deviation. For one seed, a cell has the value and, in brackets, the standard error. `to best` "
         "and `to baseline` are the differences of the test ndcg@10 to the first row and to the first row of a "
         "baseline, with the standard error of the paired difference over the targets. `trials` is the number of "
         "settings that were tried for the model. `training` is the training time in minutes. `users/s` is the number "
         "of lists per second in the test. `settings` lists the keys that differ from the model's config.yaml, "
         "the sources of neighbours that the search compared, and the weights of the prior. "
         "`from_t5` means that the model was initialized from a T5. `earlier codes`, `earlier texts` and `earlier "
         "embedding` mean that these have changed since the run.")
CODE_NOTES = (" A code hit is a recommended item with the semantic ID of the target before disambiguation. Some papers "
              "count code hits; they are never lower than item hits.")


class Row(NamedTuple):
    """A row of a table: one configuration, with one run for each seed."""

    runs: list[FinishedRun]
    ranker: str       # alone or both
    gains: np.ndarray  # (B,) the test ndcg@10 of each target, as a mean over the seeds
    trials: int

    def metrics(self, split: str, protocol: str) -> list[dict]:
        """Return the metrics of each run."""
        return [run.metrics[self.ranker][split][protocol] for run in self.runs]

    def value(self, protocol: str) -> float:
        """Return the mean validation metric that sorts the rows."""
        return float(np.mean([metrics[SORTED_BY] for metrics in self.metrics("valid", protocol)]))

    @property
    def name(self) -> str:
        run = self.runs[0]
        return label_of(run.model, run.prior, self.ranker)


def compare(folder: DatasetFolder, run_root: Path, code_hits: bool = False) -> str:
    """Return tables of all finished runs of a dataset, and the commands that train missing baselines.

    The tables are also written to `compare.md` and `compare.csv` in `run_root/recommendation/<dataset>/`. Runs on an
    earlier version of the interactions, or of other training code, are not shown.

    code_hits: whether to show the metrics that count code hits, too

    Raises DataError if no run can be shown.
    """
    parent = run_root / "recommendation" / folder.name
    sha256 = load_meta(folder.interactions, folder.make_command)["sha256"]
    load_interactions(folder)  # raises an error if the meta file does not describe the file
    runs = _finished(parent, folder)
    same_data = [run for run in runs if run.inputs.get(folder.interactions.name) == sha256]
    current = [run for run in same_data if run.has_current_code()]
    if not current:
        raise DataError(parent, "has no finished run on the current interactions with the current code",
                        fix=Choice("encoder_decoder").training_command(folder, run_root))
    groups, names = _group_by_configuration(current), [*columns(), *(CODE_HITS if code_hits else ())]
    lines, csv_rows = [f"# Recommenders of {folder.name}", "", dataset_line(folder), ""], []
    for protocol in PROTOCOLS:
        rows = _rows(groups, protocol)
        num_targets = groups[0][0].metrics["alone"]["test"][protocol]["num_targets"]
        lines += [f"{HEADINGS[protocol]} ({num_targets} targets)", "", _table(rows, protocol, names), ""]
        csv_rows += [_csv_row(row, protocol, names) for row in rows]
    for num, why in ((len(runs) - len(same_data), "on an earlier version of the interactions"),
                     (len(same_data) - len(current), "of other training code")):
        lines += [f"Not shown: {num} runs {why}.", ""] * (num > 0)
    if missing := [name for name in baselines() if name not in {run.model for run in current}]:
        lines += ["Commands to train the missing baselines:", "",
                  *(f"    {Choice(name).training_command(folder, run_root)}" for name in missing), ""]
    text = "\n".join([*lines, NOTES + CODE_NOTES * code_hits])
    heads = ["model", "tokenizer", "protocol", "seeds", "runs", "trials", f"validation_{SORTED_BY}",
             *(f"{name}{part}" for name in names for part in ("", "_deviation", "_stderr")), "parameters",
             "training_seconds", "users_per_second", "settings"]
    return f"{text}\n\n{save_comparison(parent, text, csv_text(heads, csv_rows))}"


def _finished(parent: Path, folder: DatasetFolder) -> list[FinishedRun]:
    """Return all readable finished runs, the oldest first."""
    finished = sorted(parent.glob("*/*/*/finished.json"), key=lambda path: (path.stat().st_mtime_ns, path))
    runs = list(read_runs((path.parent for path in finished), _read_run_and_ranks).values())
    names = {name for run in runs for name in run.inputs if _part_of_dataset(folder, name)}
    current = {name: _sha256(folder.path / name) for name in names}
    return [run._replace(changed=[_part_of_dataset(folder, name) for name, sha256 in run.inputs.items()
                                  if name in current and current[name] != sha256]) for run in runs]


def _part_of_dataset(folder: DatasetFolder, name: str) -> str:
    """Return what an input file of a run has: texts, codes or an embedding. Return "" for another file."""
    if name == folder.items.name:
        return "texts"
    kind = name.removeprefix(f"{folder.name}.").partition("-")[0]
    return {"codes": "codes", "emb": "embedding"}.get(kind, "")


def _read_run_and_ranks(folder: Path) -> FinishedRun:
    run = read_run(folder)
    return run._replace(ranks=read_ranks(folder, run.metrics, f"{run.command} --force"))


def _sha256(path: Path) -> str | None:
    try:
        return load_meta(path, "")["sha256"]
    except UserError:  # missing or stale
        return None


def _group_by_configuration(runs: list[FinishedRun]) -> list[list[FinishedRun]]:
    """Group the runs that differ only in the seed or the device.

    If several runs of a group have the same seed, only the last one is kept.
    """
    groups: dict[str, dict[int, FinishedRun]] = {}
    for run in runs:
        common = {key: value for key, value in run.config["common"].items() if key not in ("seed", "device")}
        key = json.dumps([run.model, run.variant, run.inputs, common, run.config[run.model]], sort_keys=True)
        groups.setdefault(key, {})[run.seed] = run
    return [[by_seed[seed] for seed in sorted(by_seed)] for by_seed in groups.values()]


def _rows(groups: list[list[FinishedRun]], protocol: str) -> list[Row]:
    """Return the rows of the table of a protocol, the best first. A prior alone has no row, as it is a baseline."""
    models = [group[0].model for group in groups]
    rows = []
    for group in groups:
        ranks = [run.ranks for run in group if run.ranks is not None]
        trials = group[0].metrics.get("num_trials", models.count(group[0].model))
        for ranker in (name for name in group[0].rankers if name != "prior"):
            gains = [ndcg(RankedLists(np.where(of_run[ranker][protocol] > 0, of_run[ranker][protocol], np.inf),
                                      np.empty((0, 0)), 0), 10) for of_run in ranks]
            rows.append(Row(group, ranker, np.mean(gains, axis=0), trials))
    return sorted(rows, key=lambda row: -row.value(protocol))


def _table(rows: list[Row], protocol: str, names: list[str]) -> str:
    heads = ["model", "tokenizer", "seeds", "runs", "trials", f"validation {SORTED_BY}", *names, "to best",
             "to baseline", "parameters", "training", "users/s", "settings"]
    known = baselines()
    baseline = next((row for row in rows if row.runs[0].model in known), None)
    return markdown(heads, [
        [*_names(row), str(row.trials), mean_cell(mean_and_deviation(row.metrics("valid", protocol)).get(SORTED_BY)),
         *(_cell(row.metrics("test", protocol), name) for name in names), _difference(row, rows[0]),
         _difference(row, baseline), *_costs(row), settings(row.runs[0])] for row in rows])


def _difference(row: Row, other: Row | None) -> str:
    """Return the paired difference of the test ndcg@10, with its standard error over the targets."""
    if other is None or other is row or len(row.gains) != len(other.gains):
        return ""
    difference = row.gains - other.gains
    return f"{difference.mean():+.4f} ± {difference.std() / np.sqrt(len(difference)):.4f}"


def _csv_row(row: Row, protocol: str, names: list[str]) -> list[str]:
    tests = row.metrics("test", protocol)
    metrics = mean_and_deviation(tests)
    values: list[object] = [row.trials, row.value(protocol)]
    values += [value for name in names for value in (
        metrics.get(name, {}).get("mean"), metrics.get(name, {}).get("deviation"),
        tests[0].get(f"{name}_stderr") if len(tests) == 1 else None)]
    values += [row.runs[0].metrics["num_parameters"], _mean([run.seconds for run in row.runs]),
               _mean([run.users_per_second for run in row.runs])]
    model, tokenizer, *others = _names(row)
    return [model, tokenizer, protocol, *others, *("" if value is None else str(value) for value in values),
            settings(row.runs[0])]


def _names(row: Row) -> list[str]:
    """Return the model, the tokenizer, the seeds and the ids of the runs."""
    run = row.runs[0]
    return [row.name, "" if run.variant == NO_CODES else run.variant, ", ".join(str(run.seed) for run in row.runs),
            ", ".join(run.folder.name for run in row.runs)]


def _costs(row: Row) -> list[str]:
    speed = _mean([run.users_per_second for run in row.runs])
    return [f"{row.runs[0].metrics['num_parameters']:,}",
            f"{(_mean([run.seconds for run in row.runs]) or 0) / 60:.1f}", f"{speed:,.0f}" if speed else ""]


def _cell(tests: list[dict], name: str) -> str:
    """Return the text of a table cell for a metric.

    tests: the test metrics of one run per seed

    For several seeds: the mean and the standard deviation. For one seed: the value and the standard error in brackets.
    """
    error = tests[0].get(f"{name}_stderr") if len(tests) == 1 else None
    return mean_cell(mean_and_deviation(tests).get(name)) + (f" (± {error:.4f})" if error is not None else "")


def settings(run: FinishedRun) -> str:
    """Return a text with the settings of a run that differ from the model's YAML, such as `lr=0.003 d_model=64`.

    The text also has the sources of neighbours, the weights of a prior, `from_t5` if the model was initialized from a
    T5, and what has changed in the dataset since the run.
    """
    own = flat(run.config[run.model])
    try:
        defaults = flat(resolve(run.model, config_path(run.model), DEFAULTS, []).values[run.model])
    except ConfigError:  # the model no longer exists
        defaults = own
    changed = [f"{key.split('.')[-1]}={own[key]}" for key in own if own[key] != defaults.get(key)]
    weights = [f"weight({protocol})={weight:g}" for protocol, weight in run.metrics.get("weights", {}).items()]
    if own.get("training_params.neighbours_from") == AUTO and (sources := run.neighbour_sources):
        changed.append(f"neighbours_from={AUTO}({','.join(sources)})")
    from_t5 = any(name.startswith("from_t5/") for name in run.inputs)
    origin = ["from_t5"] * from_t5 + [f"earlier {part}" for part in run.changed]
    return one_line(" ".join(changed + weights + origin))


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

"""All finished runs of a data set in one table, seeds of one configuration together; nothing is trained."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import yaml

from common.artifacts import DatasetFolder, load_meta
from common.config import resolve
from common.errors import ArtifactError, ConfigError, DataError, UserError
from common.publishing import write_text
from common.run import read_json
from common.tables import csv_text, markdown
from recommendation.models import DEFAULTS, baselines, config_path
from recommendation.runs import NO_CODES, Choice
from recommendation.seeds import mean_and_deviation

log = logging.getLogger(__name__)

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@20", "mrr@20", "coverage@10")
COLUMNS = ("model", "tokenizer", "seeds", *METRICS, "parameters", "training", "users/s", "settings")
CSV_COLUMNS = ("model", "tokenizer", "seeds", *(f"{name}{part}" for name in METRICS
                                                for part in ("", "_deviation", "_stderr")),
               "parameters", "training_seconds", "users_per_second", "settings", "filter_seen")
NOTES = ("Test split, whole catalogue, item ids; the best first, by ndcg@10. With several seeds mean ± standard "
         "deviation over them, with one ± the standard error over the users, in brackets. training: minutes of wall "
         "clock; users/s: lists a second while testing; both of the machine they ran on. settings: what differs "
         "from the model's config.yaml, and whether a run has read semantic IDs that "
         "are no longer there.")


class FinishedRun(NamedTuple):
    """What is known of one run."""

    model: str
    variant: str   # whose codes, or no-codes
    config: dict
    inputs: dict
    metrics: dict
    seconds: float
    users_per_second: float | None
    of_these_codes: bool = True  # whether the semantic IDs that it has read are those on the disk, if it reads any

    @property
    def seed(self) -> int:
        return self.config["common"]["seed"]

    @property
    def from_t5(self) -> bool:
        """Whether it has started from the weights of another model."""
        return any(name.startswith("from_t5/") for name in self.inputs)

    @property
    def filter_seen(self) -> bool:
        """Whether items of the history were left out."""
        return self.config[self.model]["training_params"]["filter_seen"]


def compare(folder: DatasetFolder, run_root: Path) -> str:
    """The tables as text, also written as Markdown and CSV into `run_root/recommendation/<D>/` if that can be.

    Baselines that were not run are named with their command. Runs of earlier interactions are counted and
    left out: their figures are of other events. Raises DataError if no run is left.
    """
    parent = run_root / "recommendation" / folder.name
    sha256 = load_meta(folder.interactions, folder.make_command)["sha256"]
    runs = _finished(parent, folder)
    current = [run for run in runs if _is_of(run, folder, sha256)]
    if not current:
        raise DataError(parent, "has no finished run of these interactions",
                        fix=Choice("encoder_decoder").training_command(folder, run_root))
    lines, rows = [f"# Recommenders of {folder.name}", ""], []
    for filtered, heading in ((False, "Nothing filtered"), (True, "Items of the history filtered")):
        table = _configurations([run for run in current if run.filter_seen is filtered])
        if table:
            lines += [f"{heading} ({table[0][0].metrics['test']['num_targets']} targets)", "",
                      markdown(COLUMNS, [row(runs_of_one) for runs_of_one in table]), ""]
            rows += [csv_row(runs_of_one) for runs_of_one in table]
    if len(runs) > len(current):
        lines += [f"{len(runs) - len(current)} runs of earlier interactions are left out.", ""]
    if missing := _missing_baselines(current, folder, run_root):
        lines += ["Baselines that were not run:", "", *(f"    {command}" for command in missing), ""]
    text = "\n".join([*lines, NOTES])
    try:
        write_text(parent / "compare.md", text + "\n")
        write_text(parent / "compare.csv", csv_text(CSV_COLUMNS, rows))
    except OSError as error:
        return f"{text}\n\ncannot write {parent / 'compare.md'} and .csv: {error.strerror}"
    return f"{text}\n\nwrote {parent / 'compare.md'} and .csv"


def _finished(parent: Path, folder: DatasetFolder) -> list[FinishedRun]:
    """All that can be read, in the order in which they finished."""
    runs = []
    for path in sorted(parent.glob("*/*/*/finished.json"), key=lambda path: (path.stat().st_mtime_ns, path)):
        try:
            runs.append(read_run(path.parent))
        except ArtifactError as error:
            log.warning("left out: %s", error)
    there = {variant: _sha256(folder.path / f"{folder.name}.codes-{variant}.npy")
             for variant in {run.variant for run in runs} - {NO_CODES}}
    return [run._replace(of_these_codes=run.variant == NO_CODES or there[run.variant] in run.inputs.values())
            for run in runs]


def _sha256(path: Path) -> str | None:
    try:
        return load_meta(path, "")["sha256"]
    except UserError:  # not there, or stale: no run can be repeated with it
        return None


def _is_of(run: FinishedRun, folder: DatasetFolder, sha256: str) -> bool:
    return run.inputs.get(folder.interactions.name) == sha256


def _missing_baselines(runs: list[FinishedRun], folder: DatasetFolder, run_root: Path) -> list[str]:
    """The commands of the baselines that lack a run under a protocol that other runs have."""
    there = {(run.model, run.filter_seen) for run in runs}
    return [Choice(baseline).training_command(folder, run_root) + (" --filter_seen" if filtered else "")
            for filtered in sorted({run.filter_seen for run in runs}) for baseline in baselines()
            if (baseline, filtered) not in there]


def read_run(folder: Path) -> FinishedRun:
    """A run folder's files. Raises ArtifactError for one that cannot be read."""
    fix = f"delete {folder}, and run the model again"
    finished = read_json(folder / "finished.json", fix, "inputs", "command")
    fix, model, times = f"{finished['command']} --force", folder.parent.parent.name, folder / "times.json"
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        config["common"]["seed"], config[model]["training_params"]["filter_seen"]  # what is read of it below
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ArtifactError(folder / "config.yaml", "cannot be read", str(error), fix) from error
    return FinishedRun(model, folder.parent.name, config, finished["inputs"],
                       read_json(folder / "metrics.json", fix, "test", "num_parameters"),
                       read_json(times, fix, "training")["training"] if times.exists() else float("nan"),
                       finished.get("users_per_second"))


def _configurations(runs: list[FinishedRun]) -> list[list[FinishedRun]]:
    """The runs of each configuration, which differ in their seed alone; the best by NDCG@10 first.

    Of a seed's runs on several devices the last one counts.
    """
    found: dict[str, dict[int, FinishedRun]] = {}
    for run in runs:
        common = {key: value for key, value in run.config["common"].items() if key not in ("seed", "device")}
        key = json.dumps([run.model, run.variant, run.inputs, common, run.config[run.model]], sort_keys=True)
        found.setdefault(key, {})[run.seed] = run
    return sorted(([by_seed[seed] for seed in sorted(by_seed)] for by_seed in found.values()),
                  key=lambda of_one: -_mean([run.metrics["test"]["ndcg@10"] for run in of_one]))


def row(runs: list[FinishedRun]) -> list[str]:
    """A configuration's cells for people."""
    run, tests, speed = runs[0], [run.metrics["test"] for run in runs], _users_per_second(runs)
    return [*_names(runs), *(cell(tests, name) for name in METRICS), f"{run.metrics['num_parameters']:,}",
            f"{_mean([run.seconds for run in runs]) / 60:.1f}", f"{speed:,.0f}" if speed else "", settings(run)]


def csv_row(runs: list[FinishedRun]) -> list[str]:
    """A configuration's values for programs: plain numbers, nothing where there is none."""
    run, tests = runs[0], [run.metrics["test"] for run in runs]
    figures = mean_and_deviation(tests)
    values = [value for name in METRICS for value in (
        figures.get(name, {}).get("mean"), figures.get(name, {}).get("deviation"),
        tests[0].get(f"{name}_stderr") if len(tests) == 1 else None)]
    values += [run.metrics["num_parameters"], _mean([run.seconds for run in runs]), _users_per_second(runs)]
    return [*_names(runs), *("" if value is None else str(value) for value in values), settings(run),
            str(run.filter_seen).lower()]


def _names(runs: list[FinishedRun]) -> list[str]:
    return [runs[0].model, "" if runs[0].variant == NO_CODES else runs[0].variant,
            ", ".join(str(run.seed) for run in runs)]


def _users_per_second(runs: list[FinishedRun]) -> float | None:
    speeds = [run.users_per_second for run in runs if run.users_per_second is not None]
    return _mean(speeds) if speeds else None


def cell(tests: list[dict], name: str) -> str:
    """A figure with its uncertainty: over the seeds if there are several, else over the users if it is known."""
    figure = mean_and_deviation(tests).get(name)
    if figure is None:
        return ""
    if figure["deviation"] is not None:
        return f"{figure['mean']:.4f} ± {figure['deviation']:.4f}"
    error = tests[0].get(f"{name}_stderr")
    return f"{figure['mean']:.4f}" + (f" (± {error:.4f})" if error is not None else "")


def settings(run: FinishedRun) -> str:
    """The keys that are not as in the model's own YAML (`lr=0.003 d_model=64`), `from_t5`, and `earlier codes`."""
    own = flat(run.config[run.model])
    try:
        defaults = flat(resolve(run.model, config_path(run.model), DEFAULTS, []).values[run.model])
    except ConfigError:  # the model has been removed since
        defaults = own
    changed = [f"{key.split('.')[-1]}={own[key]}" for key in own
               if own[key] != defaults.get(key) and not key.endswith(".filter_seen")]  # which has tables of its own
    origin = [word for word, holds in (("from_t5", run.from_t5), ("earlier codes", not run.of_these_codes)) if holds]
    return " ".join(changed + origin)


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested dicts -> `dotted.key -> value`."""
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

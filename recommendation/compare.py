"""All finished runs of a data set in one table: seeds of one configuration together, floors included."""

import json
from pathlib import Path
from typing import NamedTuple

import yaml

from common.artifacts import DatasetFolder, load_meta, write_text
from common.config import resolve
from common.errors import DataError
from common.run import read_json
from common.tables import csv_text, markdown
from recommendation.catalogue import NO_CODES
from recommendation.models import DEFAULTS, FLOORS, config_path
from recommendation.seeds import mean_and_deviation

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@20", "mrr@20", "coverage@10")
COLUMNS = ("model", "tokenizer", "seeds", *METRICS, "parameters", "training", "users/s", "settings")
NOTES = ("Test split, whole catalogue, item ids; the best first, by ndcg@10. With several seeds mean ± standard "
         "deviation over them, with one ± the standard error over the users, in brackets. training: minutes of wall "
         "clock; users/s: lists a second while testing; both of the machine they ran on. settings: what differs "
         "from the first configuration of the same model and tokenizer.")


class FinishedRun(NamedTuple):
    """What is known of one run."""

    model: str
    variant: str   # whose codes, or no-codes
    config: dict
    inputs: dict
    metrics: dict
    seconds: float
    users_per_second: float | None

    @property
    def filter_seen(self) -> bool:
        """Whether items of the history were left out; runs that are older than the key did not."""
        return self.config[self.model]["training_params"].get("filter_seen", False)


def compare(folder: DatasetFolder, run_root: Path) -> str:
    """The tables as text, also written as Markdown and CSV into `run_root/recommendation/<D>/`.

    Floors that were not run yet are run: it takes seconds. Runs of earlier interactions are counted and
    left out: their figures are of other events. Raises DataError if no run is left.
    """
    parent = run_root / "recommendation" / folder.name
    sha256 = load_meta(folder.interactions, folder.make_command)["sha256"]
    runs = _finished(parent)
    current = [run for run in runs if _is_of(run, folder, sha256)]
    if not current:
        raise DataError(parent, "has no finished run of these interactions", fix=f"python recommendation/main.py "
                        f"--category {folder.name}{folder.root_flag}")
    if _run_floors(folder, run_root, {(run.model, run.filter_seen) for run in current}):
        runs = _finished(parent)
        current = [run for run in runs if _is_of(run, folder, sha256)]
    lines, rows = [f"# Recommenders of {folder.name}", ""], []
    for filtered, heading in ((False, "Nothing filtered"), (True, "Items of the history filtered")):
        of_protocol = [run for run in current if run.filter_seen is filtered]
        if of_protocol:
            table = sorted(_rows(of_protocol), key=lambda row: -row[0])
            lines += [f"{heading} ({of_protocol[0].metrics['test']['num_targets']} targets)", "",
                      markdown(COLUMNS, [cells for _, cells in table]), ""]
            rows += [[*cells, str(filtered).lower()] for _, cells in table]
    if len(runs) > len(current):
        lines += [f"{len(runs) - len(current)} runs of earlier interactions are left out.", ""]
    text = "\n".join([*lines, NOTES])
    write_text(parent / "compare.md", text + "\n")
    write_text(parent / "compare.csv", csv_text((*COLUMNS, "filter_seen"), rows))
    return f"{text}\n\nwrote {parent / 'compare.md'} and .csv"


def _finished(parent: Path) -> list[FinishedRun]:
    return [read_run(path.parent) for path in sorted(parent.glob("*/*/*/finished.json"))]


def _is_of(run: FinishedRun, folder: DatasetFolder, sha256: str) -> bool:
    return run.inputs.get(folder.interactions.name) == sha256


def _run_floors(folder: DatasetFolder, run_root: Path, there: set[tuple[str, bool]]) -> int:
    """Run the floors that are not `there` (model, filter_seen) for a protocol that is; returns how many."""
    from recommendation.pipeline import Pipeline

    lacking = [(floor, filtered) for filtered in sorted({filtered for _, filtered in there}) for floor in FLOORS
               if (floor, filtered) not in there]
    for floor, filtered in lacking:
        key = str(filtered).lower()
        config = resolve(floor, config_path(floor), DEFAULTS, [("filter_seen", key)])
        command = f"python recommendation/main.py --model {floor} --category {folder.name} --filter_seen={key}"
        Pipeline(config, folder, "", "", None, run_root, command + folder.root_flag).execute(force=False)
    return len(lacking)


def read_run(folder: Path) -> FinishedRun:
    """A run folder's files. Raises ArtifactError for one that cannot be read."""
    finished = read_json(folder / "finished.json", "run the model again with --force")
    times = folder / "times.json"
    return FinishedRun(folder.parent.parent.name, folder.parent.name,
                       yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")), finished["inputs"],
                       read_json(folder / "metrics.json", f"{finished['command']} --force"),
                       read_json(times, "")["training"] if times.exists() else float("nan"),
                       finished.get("users_per_second"))


def _rows(runs: list[FinishedRun]) -> list[tuple[float, list[str]]]:
    """One row a configuration, with its NDCG@10."""
    configurations: dict[str, list[FinishedRun]] = {}
    for run in runs:
        common = {key: value for key, value in run.config["common"].items() if key not in ("seed", "device")}
        key = json.dumps([run.model, run.variant, run.inputs, common, run.config[run.model]], sort_keys=True)
        configurations.setdefault(key, []).append(run)
    first: dict[tuple[str, str], FinishedRun] = {}
    rows = []
    for of_one in configurations.values():
        reference = first.setdefault((of_one[0].model, of_one[0].variant), of_one[0])
        rows.append((_mean([run.metrics["test"]["ndcg@10"] for run in of_one]), row(of_one, reference)))
    return rows


def row(runs: list[FinishedRun], reference: FinishedRun) -> list[str]:
    """The cells of one configuration, whose runs differ in their seed alone."""
    run, tests = runs[0], [run.metrics["test"] for run in runs]
    speeds = [r.users_per_second for r in runs if r.users_per_second is not None]
    return [run.model, "" if run.variant == NO_CODES else run.variant,
            ", ".join(sorted(str(r.config["common"]["seed"]) for r in runs)), *(cell(tests, name) for name in METRICS),
            f"{run.metrics['num_parameters']:,}", f"{_mean([r.seconds for r in runs]) / 60:.1f}",
            f"{_mean(speeds):,.0f}" if speeds else "", differences(reference, run)]


def cell(tests: list[dict], name: str) -> str:
    """A figure with its uncertainty: over the seeds if there are several, else over the users if it is known."""
    if name not in tests[0]:
        return ""
    figure = mean_and_deviation(tests)[name]
    if figure["deviation"] is not None:
        return f"{figure['mean']:.4f} ± {figure['deviation']:.4f}"
    error = tests[0].get(f"{name}_stderr")
    return f"{figure['mean']:.4f}" + (f" (± {error:.4f})" if error is not None else "")


def differences(reference: FinishedRun, run: FinishedRun) -> str:
    """`lr=0.003 d_model=64`: the keys that are not as in the reference; `other codes` where the inputs are others."""
    theirs, ours = (flat(r.config[r.model]) for r in (reference, run))
    changed = [f"{key.split('.')[-1]}={ours[key]}" for key in ours if ours[key] != theirs.get(key)]
    return " ".join(changed + (["other codes"] if run.inputs != reference.inputs else []))


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested dicts -> `dotted.key -> value`."""
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

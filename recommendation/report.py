"""A report on chosen runs of a dataset: a table, and the recommendations for three users."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np

from common.artifacts import DatasetFolder, load_items, load_meta, load_users, share_of_repeats
from common.errors import ArtifactError
from common.reading import fits, parse_json, read_text, shortened
from common.run import read_finished
from common.tables import markdown, percent
from recommendation.dataset import Sequences
from recommendation.metrics import PROTOCOLS, RANKERS
from recommendation.runs import current_inputs, read_run, require_same_inputs

NUM_USERS, NUM_HISTORY, NUM_RECOMMENDED = 3, 10, 10
TABLE_METRICS = ("recall@10", "ndcg@10")
SPREAD = ("A trained model has other metrics with another seed, and also with the same seed on another machine, "
          "because rounding errors grow during the training. `python recommendation/main.py --seeds 0,1,2` shows this "
          "spread.")


def report(folder: DatasetFolder, run_root: Path, runs: list[Path]) -> str:
    """Return a table of the runs, and the recommendations of the last run for three users.

    Raises ArtifactError if the interactions or the semantic IDs have changed since the training.
    """
    finished = [read_run(run) for run in runs]
    for run in finished:
        require_same_inputs(run.folder, run.inputs, current_inputs(folder, run), run.command)
    models = [run.model for run in finished]
    names = [run.model if models.count(run.model) == 1 else f"{run.model} (seed {run.seed}, run {run.folder.name})"
             for run in finished]
    last = finished[-1]
    repeats = share_of_repeats(load_meta(folder.interactions, folder.make_command))
    unseen = "" if repeats is None else (
        f"{percent(repeats)} of the test events repeat an item of the history; lists of unseen items always miss them. "
        if repeats else "No test event repeats an item of the history, so a seen item is never right. ")
    heading = (f"{folder.name}: metrics of the test split ({last.metrics['alone']['test']['all']['num_targets']} "
               "targets; standard errors in brackets), ranked over the whole catalogue. `all`: every item can be "
               f"recommended. `unseen`: the items of the history are excluded. {unseen}The lists below are for "
               f"{last.protocol} items.")
    rows = {name: run.metrics for name, run in zip(names, finished, strict=True)}
    priors = {name: run.prior for name, run in zip(names, finished, strict=True)}
    shown = examples(folder, runs[-1], label_of(names[-1], last.prior, last.rankers[-1]), last.protocol)
    return "\n".join([heading, "", table(rows, priors), "", SPREAD, "", shown])


def table(rows: Mapping[str, dict], priors: dict[str, str]) -> str:
    """Return a Markdown table of validation and test metrics, with both protocols.

    The row of a prior is left out if it equals another row of the same name.

    rows: name of a model -> content of its metrics.json; a missing metric gives an empty cell
    priors: name of a model -> name of its prior
    """
    shown: dict[str, list[str]] = {}
    for model, row in rows.items():
        for ranker in filter(row.__contains__, RANKERS):
            label, cells = label_of(model, priors[model], ranker), _cells(row[ranker], row["protocol"])
            if ranker == "prior":
                same = _cells(rows[label]["alone"], row["protocol"]) if label in rows else shown.get(label)
                if same == cells:
                    continue
                if same:  # the baseline of this name has other settings
                    label = f"{label} (prior of {model})"
            shown[label] = cells
    return markdown(table_heads(), [[label, *cells] for label, cells in shown.items()])


def _cells(metrics: dict, selecting: str) -> list[str]:
    """Return the cells of a row after its label. `selecting` is the protocol that selects the checkpoint."""
    return [_value_cell(metrics["valid"][selecting], "ndcg@10", error=False),
            *(_value_cell(metrics["test"][protocol], name) for protocol in PROTOCOLS for name in TABLE_METRICS)]


def table_heads() -> tuple[str, ...]:
    metrics = [f"{name} ({protocol})" for protocol in PROTOCOLS for name in TABLE_METRICS]
    return ("model", "validation ndcg@10", *metrics)


def _value_cell(metrics: dict, name: str, error: bool = True) -> str:
    if name not in metrics:
        return ""
    return f"{metrics[name]:.4f}" + (f" (±{metrics[f'{name}_stderr']:.4f})" if error else "")


def label_of(model: str, prior: str, ranker: str) -> str:
    """Return the name of a row: the model, its prior, or both."""
    return {"alone": model, "prior": prior, "both": f"{model} + {prior}"}[ranker]


def seeds_table(model: str, summary: dict, prior: str) -> str:
    """Return a Markdown table with the mean and the standard deviation of metrics over several seeds."""
    return markdown((*table_heads(), "seeds"), [
        [label_of(model, prior, ranker), mean_cell(summary[ranker]["valid"][summary["protocol"]].get("ndcg@10")),
         *(mean_cell(summary[ranker]["test"][protocol].get(name)) for protocol in PROTOCOLS for name in TABLE_METRICS),
         ", ".join(map(str, summary["seeds"]))] for ranker in RANKERS if ranker in summary])


def mean_cell(value: dict | None) -> str:
    """Return the text of a table cell with a mean and, if there are several seeds, a standard deviation."""
    if value is None:
        return ""
    return f"{value['mean']:.4f}" + ("" if value["deviation"] is None else f" ± {value['deviation']:.4f}")


def examples(folder: DatasetFolder, run: Path, model: str, protocol: str) -> str:
    """Return a text with the last ten items of the history and ten recommendations, for each of three test users."""
    items, sequences = load_items(folder), Sequences.load(folder, "cpu")
    title_of = dict(zip(items["raw_id"], items["title"], strict=True))
    tested = sequences.positions("test")  # predictions.jsonl has one line per test event, in the same order
    users, targets = load_users(folder)["raw_id"][sequences.user[tested]], items["raw_id"][sequences.item[tested]]
    parts = []
    for number, row in _predictions(run, users, targets, title_of).items():
        target = tested[number]
        events = slice(max(sequences.first[target], target - NUM_HISTORY), target)
        recommended = row["unseen"] if protocol == "unseen" else row["items"]
        history = [items["title"][item] for item in sequences.item[events]]
        parts += [f"User {row['user']}: the last {len(history)} items of the history, oldest first",
                  *(f"    {title}" for title in history), f"  {model} recommends",
                  *(f"{rank:4d}. {title_of[raw_id]}{'   <- the test item' if raw_id == row['target'] else ''}"
                    for rank, raw_id in enumerate(recommended[:NUM_RECOMMENDED], start=1)),
                  f"  the test item is: {title_of[row['target']]}", ""]
    return "\n".join(parts).rstrip()


class Prediction(TypedDict):
    """The entries of a line of predictions.jsonl that the report shows."""

    user: str
    target: str
    items: list[str]
    unseen: list[str]


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
            if not fits(row, Prediction) or not all(
                    item in known for item in row["items"] + row["unseen"]):
                raise ValueError(f"Line {number + 1} is not a prediction for items of the dataset")
            if (row["user"], row["target"]) != (users[number], targets[number]):
                raise ValueError(f"Line {number + 1} is not the test event {number + 1} of the dataset")
    except (OSError, ValueError) as error:
        raise ArtifactError(path, "cannot be read", shortened(str(error)), fix) from error
    return found


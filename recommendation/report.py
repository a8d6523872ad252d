"""Tables of results, and recommendations to look at."""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np

from common.artifacts import DatasetFolder, load_items
from common.cli import Parser, add_shared_flags, add_variant_flags, parse
from common.command import run_command
from common.errors import DataError
from common.publishing import write_text
from common.run import log_to_console
from common.tables import markdown
from recommendation.dataset import Sequences
from recommendation.loading import newest_run, require_same_inputs
from recommendation.models import names
from recommendation.results import read_run
from recommendation.runs import Choice, load_source

log = logging.getLogger(__name__)

COLUMNS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
NUM_USERS, NUM_HISTORY, NUM_RECOMMENDED = 3, 10, 10


def main(argv: list[str]) -> None:
    parser = Parser(prog="recommendation.report", description="Show a data set's finished runs side by side.")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--models", default=",".join(names()), metavar="M,M",
                      help="the newest finished run of each, in this order")
    rows.add_argument("--run_list", type=Path, default=None, metavar="FILE",
                      help="the runs in a file that recommendation/main.py --run_list wrote")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q", help="whose semantic IDs are used")
    add_shared_flags(parser)
    add_variant_flags(parser)
    args = parse(parser, argv)
    log_to_console()
    folder = DatasetFolder(args.data_root, args.dataset)
    folder.require()
    text = report(folder, args.run_root, chosen_runs(args, folder))
    path = args.run_root / "recommendation" / args.dataset / "report.md"
    write_text(path, text + "\n")
    log.info("%s\n\nreport: wrote %s", text, path)


def chosen_runs(args: argparse.Namespace, folder: DatasetFolder) -> dict[Choice, Path]:
    """The folders of the runs that the flags ask for. Raises DataError if a list has none."""
    listed = []
    if args.run_list is not None:
        listed = [Path(line) for line in args.run_list.read_text(encoding="utf-8").splitlines()]
        if not listed:
            raise DataError(args.run_list, "names no run",
                            fix=f"python recommendation/main.py --model=M --run_list {args.run_list}")
    models = [run.parent.parent.name for run in listed] or args.models.split(",")
    choices = [Choice(model, args.quantizer_name, args.embedding_suffix, args.tag) for model in models]
    return dict(zip(choices, listed or [newest_run(folder, args.run_root, choice) for choice in choices], strict=True))


def report(folder: DatasetFolder, run_root: Path, runs: dict[Choice, Path]) -> str:
    """The table of the runs, and the last one's recommendations for three users.

    Raises ArtifactError for a run of earlier interactions or semantic IDs.
    """
    finished = {}
    for choice, run in runs.items():
        finished[choice.model] = read_run(run)
        require_same_inputs(run, finished[choice.model].inputs, load_source(folder, choice).inputs,
                            choice.training_command(folder, run_root))
    if len({run.filter_seen for run in finished.values()}) > 1:
        raise DataError(run_root, "the runs were tested by different rules", ", ".join(
            f"{model}: filter_seen {str(run.filter_seen).lower()}" for model, run in finished.items()),
            "run them again, all with --filter_seen or all without")
    rows = {model: run.metrics for model, run in finished.items()}
    *_, (last, run) = runs.items()
    rule = "items of the history filtered" if finished[last.model].filter_seen else "nothing filtered"
    heading = (f"{folder.name}: test split, whole catalogue, item ids, {rule} "
               f"({rows[last.model]['test']['num_targets']} targets; in brackets the standard error)")
    return "\n".join([heading, "", table(rows), "", examples(folder, run, last.model)])


def table(rows: dict[str, dict]) -> str:
    """A Markdown table of test metrics, `model -> metrics.json`."""
    return markdown(("model", *COLUMNS), [
        [model, *(f"{row['test'][name]:.4f} (±{row['test'][name + '_stderr']:.4f})" for name in COLUMNS)]
        for model, row in rows.items()])


def seeds_table(model: str, summary: dict) -> str:
    """The same of several seeds, mean and standard deviation over them."""
    figures = [summary["test"][name] for name in COLUMNS]
    cells = [f"{f['mean']:.4f}" + (f" ± {f['deviation']:.4f}" if f["deviation"] is not None else "") for f in figures]
    return markdown(("model", "seeds", *COLUMNS), [[model, ", ".join(map(str, summary["seeds"])), *cells]])


def examples(folder: DatasetFolder, run: Path, model: str) -> str:
    """For three users spread over the file: the end of their history and the ten recommended titles."""
    items = load_items(folder)
    title_of = dict(zip(items["raw_id"], items["title"], strict=True))
    sequences = Sequences.load(folder, "cpu")
    tested = sequences.positions("test")  # a line each, in this order
    lines = (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    parts = []
    for number in np.linspace(0, len(lines) - 1, min(NUM_USERS, len(lines))).astype(int):
        row, target = json.loads(lines[number]), tested[number]
        events = slice(max(sequences.first[target], target - NUM_HISTORY), target)
        history = [items["title"][item] for item in sequences.item[events]]
        parts += [f"User {row['user']}: the last {len(history)} items of the history, oldest first",
                  *(f"    {title}" for title in history), f"  {model} recommends",
                  *(f"{rank:4d}. {title_of[raw_id]}{'   <- the test item' if raw_id == row['target'] else ''}"
                    for rank, raw_id in enumerate(row["items"][:NUM_RECOMMENDED], start=1)),
                  f"  the test item is: {title_of[row['target']]}", ""]
    return "\n".join(parts).rstrip()


if __name__ == "__main__":
    sys.exit(run_command(main))

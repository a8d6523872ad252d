"""Tables of results, and recommendations to look at."""

import logging
import sys

import numpy as np

from common.artifacts import DatasetFolder, load_items, load_users, variant, write_text
from common.cli import Parser, add_shared_flags, add_variant_flags, parse
from common.errors import DataError, run_command
from common.run import latest_run, log_to_console, read_json
from recommendation.models import find_class, names

log = logging.getLogger(__name__)

COLUMNS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
NUM_USERS, NUM_HISTORY, NUM_RECOMMENDED = 3, 10, 10


def main(argv: list[str]) -> None:
    parser = Parser(prog="recommendation.report", description="Show a data set's finished runs side by side.")
    parser.add_argument("--models", default=",".join(names()), metavar="M,M", help="rows, in this order")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q", help="whose semantic IDs are used")
    add_shared_flags(parser)
    add_variant_flags(parser)
    args = parse(parser, argv)
    log_to_console()
    folder = DatasetFolder(args.data_root, args.dataset)
    folder.require()
    text = report(folder, args.run_root, args.models.split(","), variant(args.quantizer_name, args.embedding_suffix,
                                                                         args.tag))
    path = args.run_root / "recommendation" / args.dataset / "report.md"
    write_text(path, text + "\n")
    log.info("%s\n\nreport: wrote %s", text, path)


def report(folder: DatasetFolder, run_root, models: list[str], of_codes: str) -> str:
    """The table of the models' newest finished runs, and the last one's recommendations for three users."""
    from recommendation.catalogue import NO_CODES

    runs = {}
    for model in models:
        parent = run_root / "recommendation" / folder.name / model
        run = latest_run(parent / (of_codes if find_class(model).needs_codes else NO_CODES))
        if run is None:
            raise DataError(parent, "has no finished run",
                            fix=f"python recommendation/main.py --model={model} --category={folder.name}")
        runs[model] = run
    rows = {model: read_json(run / "metrics.json", "run the model again with --force") for model, run in runs.items()}
    heading = (f"{folder.name}: test split, whole catalogue, item ids, nothing filtered "
               f"({next(iter(rows.values()))['test']['num_targets']} users; in brackets the standard error)")
    return "\n".join([heading, "", table(rows), "", examples(folder, runs[models[-1]], models[-1])])


def table(rows: dict[str, dict]) -> str:
    """A Markdown table of test metrics, `model -> metrics.json`."""
    width = max(len("model"), *map(len, rows))
    lines = [f"| {'model':<{width}} | " + " | ".join(f"{name:<16}" for name in COLUMNS) + " |",
             f"|{'-' * (width + 2)}|" + "|".join("-" * 18 for _ in COLUMNS) + "|"]
    for model, row in rows.items():
        cells = (f"{row['test'][name]:.4f} (±{row['test'][name + '_stderr']:.4f})" for name in COLUMNS)
        lines.append(f"| {model:<{width}} | " + " | ".join(f"{cell:<16}" for cell in cells) + " |")
    return "\n".join(lines)


def examples(folder: DatasetFolder, run, model: str) -> str:
    """For three users spread over the file: the end of their history and the ten recommended titles."""
    import json

    from recommendation.dataset import Sequences

    items, users = load_items(folder), load_users(folder)
    title_of = dict(zip(items["raw_id"], items["title"], strict=True))
    user_of = {raw_id: index for index, raw_id in enumerate(users["raw_id"])}
    sequences = Sequences.load(folder, "cpu")
    lines = (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    parts = []
    for number in np.linspace(0, len(lines) - 1, min(NUM_USERS, len(lines))).astype(int):
        row = json.loads(lines[number])
        events = np.flatnonzero(sequences.user == user_of[row["user"]])[:-1][-NUM_HISTORY:]
        history = [items["title"][item] for item in sequences.item[events]]
        parts += [f"User {row['user']}: the last {len(history)} items of the history, oldest first",
                  *(f"    {title}" for title in history), f"  {model} recommends",
                  *(f"{rank:4d}. {title_of[raw_id]}{'   <- the test item' if raw_id == row['target'] else ''}"
                    for rank, raw_id in enumerate(row["items"][:NUM_RECOMMENDED], start=1)),
                  f"  the test item is: {title_of[row['target']]}", ""]
    return "\n".join(parts).rstrip()


if __name__ == "__main__":
    sys.exit(run_command(main))

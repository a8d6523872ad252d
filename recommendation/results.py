"""Show finished runs of a dataset in one table, and the recommendations of the last run for three users."""

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

from common.artifacts import DatasetFolder, load_users
from common.cli import Parser, add_shared_flags, add_variant_flags, check_name, parse
from common.command import run_command
from common.errors import DataError
from common.publishing import write_text
from common.reading import read_text, shortened
from common.run import log_to_console
from recommendation.inputs import Choice
from recommendation.models import config_path, names
from recommendation.report import report
from recommendation.runs import find_run

log = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    args = parse(make_parser(), argv)
    check_name("--quantizer_name", args.quantizer_name)
    log_to_console()
    folder = DatasetFolder(args.data_root, args.dataset)
    folder.require()
    runs = chosen_runs(args, folder)
    text = report(folder, args.run_root, runs)
    path = args.run_root / "recommendation" / args.dataset / "report.md"
    write_text(path, text + "\n")
    last = Choice(runs[-1].parent.parent.name, args.quantizer_name, args.embedding_suffix, args.tag)
    log.info("%s\n\nreport: wrote %s\nMore recommendations: %s --user=%s", text, path,
             last.training_command(folder, args.run_root, "recommend.py"),
             shlex.quote(load_users(folder)["raw_id"][0]))


def make_parser() -> Parser:
    parser = Parser(prog="recommendation.results", description=__doc__)
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--models", default=None, metavar="M,M",
                      help="show the latest finished run of each of these models, in this order (default: all models "
                           "with a finished run)")
    rows.add_argument("--run_list", type=Path, default=None, metavar="FILE",
                      help="show the runs in a file that recommendation/main.py --run_list wrote")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q",
                        help="the quantizer that made the semantic IDs")
    add_shared_flags(parser)
    add_variant_flags(parser)
    return parser


def chosen_runs(args: argparse.Namespace, folder: DatasetFolder) -> list[Path]:
    """Return the run folders that the flags select. Raises DataError if a run does not exist."""
    if args.run_list is not None:
        return _listed_runs(args.run_list, args.run_root / "recommendation" / folder.name)
    choices = [Choice(model, args.quantizer_name, args.embedding_suffix, args.tag)
               for model in dict.fromkeys(names() if args.models is None else args.models.split(","))]
    if args.models is None:
        choices = [choice for choice in choices
                   if any(choice.runs(args.run_root, folder.name).glob("*/finished.json"))] or choices[:1]
    for choice in choices:
        config_path(choice.model, "--models")
    return [find_run(folder, args.run_root, choice) for choice in choices]


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


if __name__ == "__main__":
    sys.exit(run_command(main))

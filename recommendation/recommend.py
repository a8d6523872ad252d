"""Recommend items for a user of the dataset, or for given histories, with a trained recommender.

A history is a list of raw item ids, oldest first. Write --history A B "C, with a comma" or --history A,B. If an id
begins with a dash, write --user=-U or --history=-A --history=B. In a file for --histories, each line is ["A", "B"] or
{"user": "me", "history": ["A", "B"]}, or {"user": "U"} to use all events of user U in the dataset.
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command import run_command  # noqa: E402 (needs the path above)
from common.errors import ConfigError  # noqa: E402 (needs the path above)

if TYPE_CHECKING:
    from recommendation.recommender import Result

log = logging.getLogger("recommendation")

HEADING = re.compile(r"(User .*|History \d+) \(\d+ known items.*\)")  # the first line of a table


def main(argv: list[str]) -> None:
    from common.artifacts import DatasetFolder
    from common.cli import check_name, parse
    from common.output import show
    from common.targets import write_target
    from recommendation.models import config_path

    args = parse(make_parser(), argv)
    check_name("--quantizer_name", args.quantizer_name)
    check_name("--run", args.run)
    config_path(args.model)
    if args.top_k < 1:
        raise ConfigError(f"--top_k {args.top_k}", "must be at least 1", fix="use --top_k 10")
    check_output(args)
    DatasetFolder(args.data_root, args.dataset).require()

    from common.run import log_to_console

    log_to_console()
    from recommendation.histories import Query, read_histories
    from recommendation.recommender import Recommender

    queries = read_histories(args.histories) if args.histories else [Query(args.user, None, "--user")]
    recommender = Recommender.load(args.dataset, args.model, args.quantizer_name, args.embedding_suffix, args.tag,
                                   args.run, args.data_root, args.run_root, args.device)
    if args.history is not None:
        queries = [Query(None, recommender.lookup.split_at_commas(args.history), "--history")]
    results = recommender.answer(queries, args.top_k, {"true": True, "false": False, "auto": None}[args.filter_seen])
    lines = (_json_lines if args.format == "jsonl" else _table_lines)(results)
    if args.output:
        write_target(args.output, "".join(f"{line}\n" for line in lines))
        log.info("recommendation: wrote %s", args.output)
    else:
        for line in lines:
            show(line)


def check_output(args: argparse.Namespace) -> None:
    """Raise ConfigError if --output names the file of --histories, or a file that another command has written."""
    from common.targets import check_target

    path, histories = args.output, args.histories
    if path is None:
        return
    if histories and histories.exists() and path.exists() and path.samefile(histories):
        raise ConfigError(f"--output {path}", "is the file with the histories", fix="choose the name of a new file")
    check_target("--output", path, (args.data_root, args.run_root), is_answer)


def is_answer(line: str) -> bool:
    """Return whether a line could be the first line of the output of this command, in one of its formats."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return HEADING.fullmatch(line) is not None
    return isinstance(answer, dict) and {"items", "titles", "scores", "unknown"} <= answer.keys()


def make_parser():
    from common.cli import Parser, add_shared_flags, add_variant_flags
    from recommendation.models import names

    parser = Parser(prog="recommendation/recommend.py", description=__doc__)
    parser.add_argument("--model", default="encoder_decoder", metavar="M", help=f"one of {', '.join(names())}")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q",
                        help="the quantizer that made the semantic IDs")
    queries = parser.add_mutually_exclusive_group(required=True)
    queries.add_argument("--user", metavar="U",
                         help="raw id of a user in the dataset; all events of this user are the history")
    queries.add_argument("--history", nargs="*", action="extend", metavar="ID", help="raw ids of items, oldest first")
    queries.add_argument("--histories", type=Path, metavar="FILE", help="a JSON Lines file with one history per line")
    parser.add_argument("--top_k", type=int, default=10, metavar="K", help="number of items to recommend per history")
    parser.add_argument("--filter_seen", nargs="?", const="true", default="auto", choices=("true", "false", "auto"),
                        help="whether to exclude items that are in the history; auto: as in the training")
    parser.add_argument("--format", choices=("table", "jsonl"), default="table",
                        help="output format: table for people, jsonl for programs")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE",
                        help="write to FILE instead of standard output")
    parser.add_argument("--run", default=None, metavar="ID",
                        help="id of the finished run to load (default: the run of the last training command)")
    parser.add_argument("--device", default=None, metavar="DEV",
                        help="auto, cpu, cuda or cuda:<n> (default: the device in the run's configuration)")
    add_shared_flags(parser)
    add_variant_flags(parser)
    return parser


def _json_lines(results: list["Result"]) -> Iterator[str]:
    for result in results:
        yield json.dumps({**({} if result.user is None else {"user": result.user}),
                          "items": [item.raw_id for item in result.items],
                          "titles": [item.title for item in result.items],
                          "scores": [item.score for item in result.items], "unknown": len(result.unknown),
                          **({"fallback": "popularity"} if result.fallback else {})}, ensure_ascii=False)


def _table_lines(results: list["Result"]) -> Iterator[str]:
    for number, result in enumerate(results, start=1):
        notes = [f"{result.num_known} known items"]
        notes += [f"{len(result.unknown)} unknown items skipped"] * bool(result.unknown)
        notes += ["ranked by popularity"] * result.fallback
        yield (f"User {result.user}" if result.user is not None else f"History {number}") + f" ({'; '.join(notes)})"
        width = max((len(item.raw_id) for item in result.items), default=0)
        for place, item in enumerate(result.items, start=1):
            yield f"{place:4d}.  {item.score:12.4f}  {item.raw_id:<{width}}  {item.title or ''}"
        if number < len(results):
            yield ""


if __name__ == "__main__":
    sys.exit(run_command(main))

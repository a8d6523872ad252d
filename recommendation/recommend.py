"""Recommend items for a user of the dataset, or for any histories, with a trained recommender.

A history is a list of raw ids, oldest first, with one word per id: --history A B "C, with a comma". A word that is not
an item is split at its commas, so A,B,C works too. If an id begins with a dash, write --history=-A. A file of histories
has JSON lines: ["A", "B"], {"user": "me", "history": ["A", "B"]}, or {"user": "U"} for all events of user U.
"""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command import run_command  # noqa: E402 (needs the path above)
from common.errors import ConfigError  # noqa: E402 (needs the path above)

log = logging.getLogger("recommendation")

NUM_NAMED = 5  # unknown items named in a warning


def main(argv: list[str]) -> None:
    from common.artifacts import DatasetFolder
    from common.cli import check_name, parse
    from common.publishing import write_text
    from recommendation.models import config_path

    args = parse(make_parser(), argv)
    check_name("--quantizer_name", args.quantizer_name)
    config_path(args.model)
    if args.top_k < 1:
        raise ConfigError(f"--top_k {args.top_k}", "must be at least 1", fix="use --top_k 10")
    check_output(args.output, args.histories)
    folder = DatasetFolder(args.data_root, args.dataset)
    folder.require()

    from common.run import log_to_console

    log_to_console()
    from recommendation.dataset import Sequences
    from recommendation.histories import Lookup, Query, read_histories
    from recommendation.runs import Choice, load_recommender

    queries = read_histories(args.histories) if args.histories else [Query(args.user, None, "--user")]
    choice = Choice(args.model, args.quantizer_name, args.embedding_suffix, args.tag)
    run = load_recommender(folder, args.run_root, choice, args.device)
    lookup = Lookup(folder, Sequences.load(folder, "cpu"))
    if args.history is not None:
        queries = [Query(None, lookup.split_at_commas(args.history), "--history")]
    histories, ranking = recommend(run, lookup, queries, args.top_k, args.filter_seen)
    lines = (_json_lines if args.format == "jsonl" else _table_lines)(histories, ranking, lookup)
    if args.output:
        write_text(args.output, "".join(f"{line}\n" for line in lines))
        log.info("recommendation: wrote %s", args.output)
    else:
        for line in lines:
            print(line)


def check_output(path: Path | None, histories: Path | None) -> None:
    """Raise ConfigError if the output is a folder, or would replace the histories or an artifact."""
    if path is None:
        return
    is_input = histories and histories.exists() and path.exists() and path.samefile(histories)
    what = ("is a folder" if path.is_dir() else "is the file with the histories" if is_input else
            "is an artifact that other commands read" if path.with_name(f"{path.name}.meta.json").exists() else None)
    if what:
        raise ConfigError(f"--output {path}", what, fix="name a new file")


def make_parser():
    from common.cli import Parser, add_shared_flags, add_variant_flags
    from recommendation.models import names

    parser = Parser(prog="recommendation/recommend.py", description=__doc__)
    parser.add_argument("--model", default="encoder_decoder", metavar="M", help=f"one of {', '.join(names())}")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q",
                        help="the quantizer that made the semantic IDs")
    queries = parser.add_mutually_exclusive_group(required=True)
    queries.add_argument("--user", metavar="U", help="raw id of a user, whose events in the dataset are the history")
    queries.add_argument("--history", nargs="*", action="extend", metavar="ID", help="raw ids of items, oldest first")
    queries.add_argument("--histories", type=Path, metavar="FILE", help="a file of JSON lines, one history per line")
    parser.add_argument("--top_k", type=int, default=10, metavar="K", help="number of items per history")
    parser.add_argument("--filter_seen", action="store_true", help="do not recommend the items of the history")
    parser.add_argument("--format", choices=("table", "jsonl"), default="table",
                        help="output format: table for people, jsonl for programs")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE",
                        help="write to FILE instead of standard output")
    parser.add_argument("--device", default=None, metavar="DEV",
                        help="auto, cpu, cuda, cuda:<n> (default: as in the run's configuration)")
    add_shared_flags(parser)
    add_variant_flags(parser)
    return parser


def recommend(run, lookup, queries, top_k: int, filter_seen: bool):
    """Return the Histories of the queries (list[Query]) and their Ranking; log warnings for unusual input.

    run: LoadedRun
    lookup: Lookup
    """
    from recommendation.evaluator import rank

    histories, sequences, num_items = lookup.histories(queries), lookup.sequences, len(lookup.raw_ids)
    if len(queries) > num_items:
        run.model.prepare()
    params = run.config.training_params
    ranking = rank(run.model, histories, sequences.training_counts(num_items), params, top_k, filter_seen, run.device)
    _warn(histories, ranking, top_k, num_items, params["max_history"])
    return histories, ranking


def _warn(histories, ranking, top_k: int, num_items: int, max_history: int) -> None:
    unknown = [raw_id for row in histories.unknown for raw_id in row]
    named = ", ".join([*map(repr, unknown[:NUM_NAMED]), *["…"] * (len(unknown) > NUM_NAMED)])
    num_empty, num_long = int(ranking.fallback.sum()), int((histories.lengths > max_history).sum())
    num_short = int((ranking.items < 0).any(axis=1).sum())
    for what, count, more in (
            ("unknown items skipped", len(unknown), f" ({named})"),
            ("histories without a known item, ranked by popularity", num_empty, ""),
            (f"histories longer than {max_history} items, of which only the newest items are used", num_long, ""),
            ("histories with fewer than --top_k recommendations, because no other items are left", num_short, "")):
        if count:
            log.warning("recommendation: %s: %d%s", what, count, more)
    if top_k > num_items:
        log.warning("recommendation: --top_k is %d, but the catalogue has only %d items", top_k, num_items)


def _json_lines(histories, ranking, lookup) -> Iterator[str]:
    for row, user in enumerate(histories.users):
        items, scores = _found(ranking, row)
        yield json.dumps({**({} if user is None else {"user": user}), "items": list(lookup.raw_ids[items]),
                          "titles": list(lookup.titles[items]), "scores": scores,
                          "unknown": len(histories.unknown[row]),
                          **({"fallback": "popularity"} if ranking.fallback[row] else {})}, ensure_ascii=False)


def _table_lines(histories, ranking, lookup) -> Iterator[str]:
    for row, user in enumerate(histories.users):
        items, scores = _found(ranking, row)
        notes = [f"{histories.lengths[row]} known items"]
        notes += [f"{len(histories.unknown[row])} unknown items skipped"] * bool(histories.unknown[row])
        notes += ["ranked by popularity"] * bool(ranking.fallback[row])
        yield (f"User {user}" if user is not None else f"History {row + 1}") + f" ({'; '.join(notes)})"
        width = max(map(len, lookup.raw_ids[items]), default=0)
        for place, (item, score) in enumerate(zip(items, scores, strict=True), start=1):
            yield f"{place:4d}.  {score:12.4f}  {lookup.raw_ids[item]:<{width}}  {lookup.titles[item] or ''}"
        if row + 1 < len(histories.users):
            yield ""


def _found(ranking, row: int):
    """Return the items of a row without its empty positions, and their scores as a list of floats."""
    found = ranking.items[row] >= 0
    return ranking.items[row][found], ranking.scores[row][found].astype(float).round(6).tolist()


if __name__ == "__main__":
    sys.exit(run_command(main))

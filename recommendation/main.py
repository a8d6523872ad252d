"""Train a recommender on a data set and measure it in item ids; compare all that were."""

import logging
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import run_command  # noqa: E402 (the path comes first)


def main(argv: list[str]) -> None:
    from common.artifacts import DatasetFolder
    from common.cli import check_name, command_line, parse
    from common.config import resolve
    from recommendation.models import DEFAULTS, config_path

    args = parse(make_parser(argv), argv, open_ended=True)
    check_name("--quantizer_name", args.quantizer_name)
    config = resolve(args.model, args.config or config_path(args.model), DEFAULTS, overrides(args), args.flags)
    folder = DatasetFolder(args.data_root, args.dataset)
    folder.require()

    from common.run import log_to_console

    log_to_console()
    if args.compare:
        from recommendation.compare import compare

        print(compare(folder, args.run_root))
    else:
        train(args, config, folder, command_line("python recommendation/main.py", argv))


def overrides(args) -> list[tuple[str, str]]:
    """The configuration keys that are set, those that have flags of their own among them."""
    return args.overrides + ([("filter_seen", args.filter_seen)] if args.filter_seen else [])


def train(args, config, folder, command: str) -> None:
    """Train and test with the one seed or with several, and print the table."""
    from recommendation.pipeline import Pipeline
    from recommendation.report import seeds_table, table
    from recommendation.seeds import parse_seeds, run_seeds

    def pipeline() -> Pipeline:
        return Pipeline(config, folder, args.quantizer_name, args.embedding_suffix, args.tag, args.run_root, command)

    log = logging.getLogger("recommendation")
    if args.seeds:
        summary = run_seeds(config, parse_seeds(args.seeds), pipeline, args.force)
        log.info("\n%s\n", seeds_table(args.model, summary))
    else:
        one = pipeline()
        metrics = one.execute(args.force)
        log.info("\n%s\n\nrecommendation: wrote %s", table({args.model: metrics}), one.run.folder)


def make_parser(argv: list[str]):
    """The flags; with --help, the keys of the chosen recommender's YAML stand below them."""
    from common.cli import Parser, add_config_flags, add_shared_flags, add_variant_flags, help_with_keys, value_of
    from recommendation.models import DEFAULTS, config_path, names

    parser = Parser(prog="recommendation/main.py", description=__doc__)
    parser.add_argument("--model", default="encoder_decoder", metavar="M", help=f"one of {', '.join(names())}")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q", help="whose semantic IDs are used")
    add_shared_flags(parser)
    add_variant_flags(parser)
    add_config_flags(parser)
    parser.add_argument("--seeds", default=None, metavar="N,N", help="run each of these, and report mean and deviation")
    parser.add_argument("--filter_seen", nargs="?", const="true", default=None, metavar="true|false",
                        help="leave the items of the history out of every list")
    parser.add_argument("--compare", action="store_true", help="show all finished runs of the data set, and stop")
    name = value_of(argv, ("--model",), "encoder_decoder")
    help_with_keys(parser, [DEFAULTS, config_path(name if name in names() else "encoder_decoder")])
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Train a recommender on a data set and measure it in item ids."""

import logging
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import run_command  # noqa: E402 (the path comes first)


def main(argv: list[str]) -> None:
    from common.artifacts import DatasetFolder
    from common.cli import check_name, command_line, parse
    from common.config import resolve
    from recommendation.export import check_t5_flags, export_t5
    from recommendation.models import DEFAULTS, config_path

    args = parse(make_parser(), argv, open_ended=True)
    check_name("--quantizer_name", args.quantizer_name)
    config = resolve(args.model, args.config or config_path(args.model), DEFAULTS, args.overrides, args.flags)
    check_t5_flags(args)
    folder = DatasetFolder(args.data_root, args.dataset)
    folder.require()

    from common.run import log_to_console

    log_to_console()
    if args.export_t5 is not None:
        export_t5(folder, args)
        return

    from recommendation.pipeline import Pipeline
    from recommendation.report import table

    pipeline = Pipeline(config, folder, args.quantizer_name, args.embedding_suffix, args.tag, args.run_root,
                        command_line("python recommendation/main.py", argv), args.from_t5)
    metrics = pipeline.execute(args.force)
    logging.getLogger("recommendation").info("\n%s\n\nrecommendation: wrote %s", table({args.model: metrics}),
                                             pipeline.run.folder)


def make_parser():
    """The flags; with --help, the keys of the default recommender's YAML stand below them."""
    from common.cli import Parser, add_config_flags, add_shared_flags, add_variant_flags, help_with_keys
    from recommendation.models import DEFAULTS, config_path, names

    parser = Parser(prog="recommendation/main.py", description=__doc__)
    parser.add_argument("--model", default="encoder_decoder", metavar="M", help=f"one of {', '.join(names())}")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q", help="whose semantic IDs are used")
    add_shared_flags(parser)
    add_variant_flags(parser)
    add_config_flags(parser)
    parser.add_argument("--export_t5", type=Path, default=None, metavar="DIR",
                        help="write the newest finished encoder_decoder as a folder for transformers' T5, and stop")
    parser.add_argument("--from_t5", type=Path, default=None, metavar="DIR",
                        help="start the encoder_decoder with the weights of such a folder")
    help_with_keys(parser, [DEFAULTS, config_path("encoder_decoder")])
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))

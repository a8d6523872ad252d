"""Train recommenders on a data set and measure them in item ids; compare and export what was trained."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command import run_command  # noqa: E402 (the path comes first)


def main(argv: list[str]) -> None:
    from common.artifacts import DatasetFolder
    from common.cli import check_name, command_line, parse
    from common.config import resolve
    from recommendation.export.t5 import check_t5_flags
    from recommendation.models import DEFAULTS, config_path
    from recommendation.options import (
        check_training,
        make_parser,
        overrides,
        parse_seeds,
        refuse_what_nobody_reads,
        without_run_list,
    )

    parser = make_parser(argv)
    args = parse(parser, argv, open_ended=True)
    for flag in ("quantizer_name", "export_item_embeddings"):
        check_name(f"--{flag}", getattr(args, flag))
    own = config_path(args.model)
    config = resolve(args.model, args.config or own, DEFAULTS, overrides(args), args.flags, own)
    check_training(config, args.seeds)
    if args.seeds is not None:
        args.seeds = parse_seeds(args.seeds)
    check_t5_flags(args)
    refuse_what_nobody_reads(args, parser)
    folder = DatasetFolder(args.data_root, args.dataset)
    folder.require()

    from common.run import log_to_console
    from recommendation.commands import run

    log_to_console()
    run(args, config, folder, command_line("python recommendation/main.py", without_run_list(argv)))


if __name__ == "__main__":
    sys.exit(run_command(main))

"""The whole job: data -> semantic IDs -> recommender, with the floors beside it; a table, and a page of the IDs."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent)

# The path comes first.
from common.cli import ROOT, Parser, add_shared_flags, check_name, given_flags, parse  # noqa: E402
from common.errors import run_command  # noqa: E402
from common.steps import Step, module, run_steps, script  # noqa: E402


def main(argv: list[str]) -> None:
    parser = make_parser()
    args = parse(parser, argv)
    steps = plan(parser, args)
    from common.run import log_to_console

    log_to_console()
    run_steps(steps)


def make_parser() -> Parser:
    from dataloader.flags import add_data_flags
    from quantization import models as quantizers
    from recommendation import models as recommenders

    parser = Parser(prog="run_pipeline.sh", description=__doc__)
    add_shared_flags(parser)
    add_data_flags(parser)
    parser.add_argument("--run_root", type=Path, default=ROOT / "runs", metavar="DIR", help="where runs are written")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q",
                        help=f"one of {', '.join(quantizers.names())}")
    parser.add_argument("--file", type=Path, default=None, metavar="FILE",
                        help="someone else's semantic IDs, for --quantizer_name imported")
    floors = " and ".join(recommenders.FLOORS)
    parser.add_argument("--model", default="encoder_decoder", metavar="M",
                        help=f"one of {', '.join(recommenders.names())}; {floors} run beside it")
    parser.add_argument("--filter_seen", action="store_true", help="leave the items of the history out of every list")
    parser.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda, cuda:<n>")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of whatever is drawn at random")
    return parser


def plan(parser: Parser, args: argparse.Namespace) -> list[Step]:
    """Every step of the job. Raises ConfigError for any wrong name, before the first step writes anything."""
    from dataloader.flags import make_parser as make_data_parser
    from dataloader.options import resolve_options
    from dataloader.pipeline import plan as plan_data
    from quantization import models as quantizers
    from recommendation import models as recommenders

    check_name("--quantizer_name", args.quantizer_name)
    options = resolve_options(args)
    quantizers.config_path(args.quantizer_name)
    recommenders.config_path(args.model)
    data_flags = make_data_parser("").destinations()
    steps = plan_data(options, given_flags(parser, args, data_flags))
    if options.check:
        return steps
    for suffix in _other_suffixes(args, options.suffix):
        # The transformations belong to the embedding of --suffix.
        other = argparse.Namespace(**{**vars(args), "suffix": suffix, "pca": None, "whiten": False, "zscore": False,
                                      "l2": False})
        there = {step.title for step in steps}
        steps += [step for step in plan_data(resolve_options(other), given_flags(parser, other, data_flags))
                  if step.title not in there]
    shared = given_flags(parser, args, {"dataset", "data_root", "debug", "run_root"})
    codes = ["--quantizer_name", args.quantizer_name, "--embedding_suffix", options.suffix]
    training = [*codes, *shared, *given_flags(parser, args, {"force", "seed", "device"})]
    models = [*(floor for floor in recommenders.FLOORS if floor != args.model), args.model]
    return [
        *steps,
        Step(f"quantization: {args.quantizer_name}", script("quantization/main.py", *training,
                                                            *given_flags(parser, args, {"file"}))),
        *(Step(f"recommendation: {model}", script("recommendation/main.py", "--model", model, *training,
                                                  *given_flags(parser, args, {"filter_seen"}))) for model in models),
        Step("results", module("recommendation.report", "--models", ",".join(models), *codes, *shared)),
        Step("what the semantic IDs mean", script("quantization/main.py", "--explain", *codes, *shared)),
    ]


def _other_suffixes(args: argparse.Namespace, suffix: str) -> list[str]:
    """The embeddings that the quantizer reads beside the one that is named. Its files have to be there by now."""
    from common.config import resolve
    from quantization.models import CONFIGS, config_path, find_class

    name = args.quantizer_name
    overrides = [] if args.file is None else [("file", str(args.file))]
    config = resolve(name, config_path(name), CONFIGS / "defaults.yaml", overrides)
    quantizer = find_class(name)
    quantizer.other_files(config.values)
    return [other for other in quantizer.embedding_suffixes(config.values, suffix) if other != suffix]


if __name__ == "__main__":
    sys.exit(run_command(main))

"""The flags of recommendation/main.py, and all checks of them that need neither a data set nor torch."""

import argparse
from itertools import pairwise
from pathlib import Path

from common import cli
from common.config import BOUNDS, Config, resolve
from common.errors import ConfigError, nearest
from recommendation import metrics
from recommendation.export.t5 import check_t5_flags
from recommendation.models import DEFAULTS, config_path, names


def read_flags(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """The flags and the resolved configuration. Raises ConfigError for any that is wrong or has no effect."""
    parser = make_parser(argv)
    args = cli.parse(parser, argv, open_ended=True)
    for flag in ("quantizer_name", "export_item_embeddings"):
        cli.check_name(f"--{flag}", getattr(args, flag))
    own = config_path(args.model)
    keys = args.overrides + ([] if args.filter_seen is None else [("filter_seen", args.filter_seen)])
    config = resolve(args.model, args.config or own, DEFAULTS, keys, args.flags, own)
    check_training(config, args.seeds)
    if args.seeds is not None:
        args.seeds = parse_seeds(args.seeds)
    check_t5_flags(args.model, args.export_t5, args.from_t5, args.force)
    reject_unused_flags(args, parser)
    return args, config


def make_parser(argv: list[str]) -> cli.Parser:
    """With --help, the keys of the chosen recommender's YAML stand below the flags."""
    parser = cli.Parser(prog="recommendation/main.py", description="Train recommenders on a data set and measure them "
                        "in item ids; compare and export what was trained.")
    parser.add_argument("--model", default="encoder_decoder", metavar="M", help=f"one of {', '.join(names())}")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q", help="whose semantic IDs are used")
    cli.add_shared_flags(parser)
    cli.add_variant_flags(parser)
    cli.add_config_flags(parser)
    one_or_many = parser.add_mutually_exclusive_group()
    one_or_many.add_argument("--seeds", default=None, metavar="N,N",
                             help="run each of these, and report mean and deviation")
    one_or_many.add_argument("--run_list", type=Path, default=None, metavar="FILE",
                             help="add the folder of the run to this file, for the report of several runs")
    parser.add_argument("--filter_seen", nargs="?", const="true", default=None, metavar="true|false",
                        help="leave the items of the history out of every list")
    parser.add_argument("--compare", action="store_true", help="show all finished runs of the data set, and stop")
    parser.add_argument("--export_item_embeddings", default=None, metavar="S",
                        help="write the finished run's item vectors as the embedding <D>.emb-S.npy, and stop")
    parser.add_argument("--export_t5", type=Path, default=None, metavar="DIR",
                        help="write the newest finished encoder_decoder as a folder for transformers' T5, and stop")
    parser.add_argument("--from_t5", type=Path, default=None, metavar="DIR",
                        help="start the encoder_decoder with the weights of such a folder")
    name = cli.value_of(argv, ("--model",), "encoder_decoder")
    cli.help_with_keys(parser, [DEFAULTS, config_path(name if name in names() else "encoder_decoder")])
    return parser


def reject_unused_flags(args: argparse.Namespace, parser: cli.Parser) -> None:
    """Raise ConfigError for what only training reads, or a second action, beside --compare and the exports."""
    training = ("config", "seeds", "run_list", "filter_seen", "from_t5")
    as_it_is = "it takes the newest finished run as it is"
    if args.compare:
        cli.reject_ignored(args, "--compare", (*training, "force", "export_item_embeddings", "export_t5"),
                       "it shows every finished run")
        if one := cli.given_flags(parser, args, ("model", "quantizer_name", "embedding_suffix", "tag")):
            raise ConfigError("--compare", f"{one[0]} does not go with it", "it shows every finished run",
                              f"leave out {' '.join(one)}")
    elif args.export_item_embeddings:
        cli.reject_ignored(args, "--export_item_embeddings", (*training, "export_t5"), as_it_is,
                       keys=("device", "common.device"))
    elif args.export_t5:
        cli.reject_ignored(args, "--export_t5", training, as_it_is)


def check_training(config: Config, seeds: str | None) -> None:
    """Raise ConfigError for a `select_by` that is no metric, or two ways to give seeds."""
    name, where = config.training_params["select_by"], config.origins[f"{config.name}.training_params.select_by"]
    if name not in metrics.names():
        raise ConfigError(where, f"{name!r} is no metric of a recommender", nearest(name, metrics.names()),
                          f"{', '.join(metrics.METRICS)} at {', '.join(map(str, metrics.CUTOFFS))}")
    if seeds is not None and (seed := config.origins["common.seed"]).startswith("--"):
        raise ConfigError("--seeds", f"stands beside {seed}", fix="leave one of them out")


def without_run_list(argv: list[str]) -> list[str]:
    """The flags that a run records: a list of one job's runs means nothing to the next."""
    pairs = pairwise(["", *argv])
    return [word for before, word in pairs if before != "--run_list" and word.partition("=")[0] != "--run_list"]


def parse_seeds(text: str) -> list[int]:
    """`1,2,3` -> numbers. Raises ConfigError for anything else, and for one seed twice."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError("--seeds", f"{text!r} is no list of whole numbers", fix="--seeds 1,2,3") from error
    low, high = BOUNDS["seed"]
    if len(set(seeds)) < len(seeds) or min(seeds) < low or max(seeds) > high:
        raise ConfigError("--seeds", f"{text!r} has a seed twice, or one that is not from {low} to {high}",
                          fix="--seeds 1,2,3")
    return seeds

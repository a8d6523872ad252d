"""The flags of recommendation/main.py, and the checks of them that need neither a dataset nor torch."""

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
    """Return the flags and the resolved configuration.

    Raises ConfigError for a flag or key that is wrong or has no effect.
    """
    parser = make_parser(argv)
    args = cli.parse(parser, argv, open_ended=True)
    for flag in ("quantizer_name", "export_item_embeddings", "run"):
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
    """Return the argument parser. Its --help also lists the keys of the chosen recommender's YAML."""
    parser = cli.Parser(prog="recommendation/main.py", description="Train and test recommenders on a dataset; "
                        "compare and export finished runs.")
    parser.add_argument("--model", default="encoder_decoder", metavar="M", help=f"one of {', '.join(names())}")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q",
                        help="the quantizer that made the semantic IDs")
    cli.add_shared_flags(parser)
    cli.add_variant_flags(parser)
    cli.add_config_flags(parser)
    one_or_many = parser.add_mutually_exclusive_group()
    one_or_many.add_argument("--seeds", default=None, metavar="N,N",
                             help="train with each of these seeds, and show mean and standard deviation")
    one_or_many.add_argument("--run_list", type=Path, default=None, metavar="FILE",
                             help="append the folder of the run to FILE, for a report by recommendation.results")
    parser.add_argument("--filter_seen", nargs="?", const="true", default=None, metavar="true|false",
                        help="do not recommend the items of the user's history")
    parser.add_argument("--compare", action="store_true", help="print a table of all finished runs of the dataset")
    parser.add_argument("--export_item_embeddings", default=None, metavar="S",
                        help="export the item vectors of a finished run as the embedding <D>.emb-S.npy")
    parser.add_argument("--export_t5", type=Path, default=None, metavar="DIR",
                        help="export a finished encoder_decoder into DIR, in the format of transformers' T5")
    parser.add_argument("--from_t5", type=Path, default=None, metavar="DIR",
                        help="start the training of encoder_decoder with the weights of a T5 in DIR")
    parser.add_argument("--run", default=None, metavar="ID",
                        help="with an export: the id of the finished run (default: the newest one)")
    name = cli.value_of(argv, ("--model",), "encoder_decoder")
    cli.help_with_keys(parser, [DEFAULTS, config_path(name if name in names() else "encoder_decoder")])
    return parser


def reject_unused_flags(args: argparse.Namespace, parser: cli.Parser) -> None:
    """Reject flags that have no effect together with --compare or an export, and a second action."""
    training = ("config", "seeds", "run_list", "filter_seen", "from_t5")
    reason = "The export uses a finished run without any changes"
    if args.compare:
        cli.reject_ignored(args, "--compare", (*training, "force", "export_item_embeddings", "export_t5", "run"),
                       "It only shows finished runs")
        if given := cli.given_flags(parser, args, ("model", "quantizer_name", "embedding_suffix", "tag")):
            raise ConfigError("--compare", f"cannot be combined with {given[0]}", "It shows all finished runs",
                              f"leave out {' '.join(given)}")
    elif args.export_item_embeddings:
        cli.reject_ignored(args, "--export_item_embeddings", (*training, "export_t5"), reason,
                       keys=("device", "common.device"))
    elif args.export_t5:
        cli.reject_ignored(args, "--export_t5", training, reason)
    elif args.run:
        raise ConfigError("--run", "has no effect on training", "It selects a finished run for an export",
                          "add --export_item_embeddings or --export_t5, or leave out --run")


def check_training(config: Config, seeds: str | None) -> None:
    """Raise ConfigError if `select_by` is not a metric, or if --seeds is combined with --seed."""
    name, where = config.training_params["select_by"], config.origins[f"{config.name}.training_params.select_by"]
    if name not in metrics.names():
        raise ConfigError(where, f"unknown metric {name!r}", nearest(name, metrics.names()),
                          f"use one of {', '.join(metrics.METRICS)} with one of the cutoffs "
                          f"{', '.join(map(str, metrics.CUTOFFS))}, such as ndcg@10")
    if seeds is not None and (seed := config.origins["common.seed"]).startswith("--"):
        raise ConfigError("--seeds", f"cannot be combined with {seed}", fix="leave out one of them")


def without_run_list(argv: list[str]) -> list[str]:
    """Return the flags without --run_list, for the command that a run records; the list is used by one job only."""
    pairs = pairwise(["", *argv])
    return [word for before, word in pairs if before != "--run_list" and word.partition("=")[0] != "--run_list"]


def parse_seeds(text: str) -> list[int]:
    """Return the seeds in a text such as `1,2,3`. Raises ConfigError if one is invalid or occurs twice."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError("--seeds", f"must be integers separated by commas, got {text!r}",
                          fix="write --seeds 1,2,3") from error
    low, high = BOUNDS["seed"]
    if len(set(seeds)) < len(seeds) or min(seeds) < low or max(seeds) > high:
        raise ConfigError("--seeds", f"must be different integers from {low} to {high}, got {text!r}",
                          fix="write --seeds 1,2,3")
    return seeds

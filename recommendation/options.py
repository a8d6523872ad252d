"""The command-line flags of recommendation/main.py. This module does not import torch."""

import argparse
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path

from common import cli
from common.config import BOUNDS, Config, resolve
from common.errors import ConfigError, nearest
from common.targets import check_new_folder, check_target
from recommendation import metrics
from recommendation.export.t5 import check_t5_flags
from recommendation.models import DEFAULTS, applies, config_path, names


def split_models(argv: list[str]) -> list[list[str]]:
    """Return the command line of each model in `--model A,B`. A command line with one model is returned as it is.

    Each model gets the configuration keys that have an effect on it. Raises ConfigError if a key has no effect on any
    of the models.
    """
    models = cli.value_of(argv, ("--model",), "").split(",")
    if len(models) == 1:
        return [argv]
    parser = make_parser(argv)
    args = cli.parse(parser, argv, open_ended=True)
    if repeated := next((name for name in models if models.count(name) > 1), None):
        raise ConfigError("--model", f"names {repeated!r} twice", fix="leave out one of them")
    for flag in ("config", "from_t5", "export_t5", "export_item_embeddings", "run"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag}", "cannot be combined with several models", "It belongs to one model",
                              "name one model")
    configs = {}
    for name in models:
        config = resolve(name, config_path(name), DEFAULTS, [])
        own = [(key, text) for key, text in args.overrides if config.has_key(key)]
        configs[name] = resolve(name, config_path(name), DEFAULTS, own)
    for key, _ in args.overrides:
        if not any(applies(config, key) for config in configs.values()):
            raise unknown_key(key, configs.values(), args.flags)
    flags = cli.given_flags(parser, args, parser.destinations() - {"model", "set"})
    return [[f"--model={name}", *flags,
             *(f"--set={key}={text}" for key, text in args.overrides if applies(config, key))]
            for name, config in configs.items()]


def unknown_key(key: str, configs: Collection[Config], flags: list[str]) -> ConfigError:
    """Return the error for a key that has no effect on the models of these configurations."""
    known = {leaf for config in configs for leaf in config.leaf_names()}
    if key.rpartition(".")[2] in known:
        return ConfigError(f"--{key}", f"has no effect on {', '.join(config.name for config in configs)}",
                           fix="leave it out")
    return ConfigError(f"--{key}", "unknown flag or configuration key", nearest(key, sorted({*known, *flags})))


def read_flags(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """Parse and check the command line. Return the flags, and the configuration with all overrides.

    Raises ConfigError if a flag or a configuration key is wrong or has no effect.
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
    reject_unused_flags(args, parser)
    check_t5_flags(config, args.export_t5, args.from_t5, args.force)
    roots = (args.data_root, args.run_root)
    if args.export_t5 is not None:
        check_new_folder("--export_t5", args.export_t5, roots)
    if args.run_list is not None:
        check_target("--run_list", args.run_list, roots, lambda line: Path(line).is_absolute())
    return args, config


def make_parser(argv: list[str]) -> cli.Parser:
    """Return the argument parser. Its --help also lists the configuration keys of the model."""
    parser = cli.Parser(prog="recommendation/main.py", description="Train and test recommenders on a dataset; "
                        "compare and export finished runs.")
    parser.add_argument("--model", default="encoder_decoder", metavar="M",
                        help=f"one of {', '.join(names())}; or several, separated by commas: they are trained in turn")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q",
                        help="the quantizer that made the semantic IDs")
    cli.add_shared_flags(parser)
    cli.add_variant_flags(parser)
    cli.add_config_flags(parser)
    one_or_many = parser.add_mutually_exclusive_group()
    one_or_many.add_argument("--seeds", default=None, metavar="N,N",
                             help="train once with each of these seeds, and show the mean and standard deviation of "
                                  "the metrics")
    one_or_many.add_argument("--run_list", type=Path, default=None, metavar="FILE",
                             help="append the path of the run folder to FILE; recommendation.results --run_list FILE "
                                  "shows these runs in a table")
    parser.add_argument("--filter_seen", nargs="?", const="true", default=None, metavar="true|false|auto",
                        help="whether the items of the history are excluded when the checkpoint is selected and when "
                             "the model recommends; both ways are always tested")
    parser.add_argument("--code_hits", action="store_true",
                        help="with --compare: also show metrics that count all items with the target's ID before "
                             "disambiguation")
    parser.add_argument("--compare", action="store_true", help="print a table of all finished runs of the dataset")
    parser.add_argument("--export_item_embeddings", default=None, metavar="S",
                        help="export the item vectors of a finished run to the embedding file <dataset>.emb-S.npy")
    parser.add_argument("--export_t5", type=Path, default=None, metavar="DIR",
                        help="export a finished run of encoder_decoder to DIR, in the format of transformers' T5")
    parser.add_argument("--from_t5", type=Path, default=None, metavar="DIR",
                        help="initialize encoder_decoder with the weights of the T5 model in DIR, then train it")
    parser.add_argument("--run", default=None, metavar="ID",
                        help="id of the finished run to export (default: the run of the last training command)")
    name = cli.value_of(argv, ("--model",), "encoder_decoder").split(",")[0]
    cli.help_with_keys(parser, [DEFAULTS, config_path(name if name in names() else "encoder_decoder")])
    return parser


def reject_unused_flags(args: argparse.Namespace, parser: cli.Parser) -> None:
    """Raise ConfigError if a flag has no effect on the action (--compare, an export, or training)."""
    training = ("config", "seeds", "run_list", "filter_seen", "from_t5")
    reason = "An export does not train a model"
    if args.compare:
        cli.reject_ignored(args, "--compare", (*training, "force", "export_item_embeddings", "export_t5", "run"),
                       "--compare only shows finished runs")
        if given := cli.given_flags(parser, args, ("model", "quantizer_name", "embedding_suffix", "tag")):
            raise ConfigError("--compare", f"cannot be combined with {given[0]}", "--compare shows all finished runs",
                              f"leave out {' '.join(given)}")
    elif args.export_item_embeddings:
        cli.reject_ignored(args, "--export_item_embeddings", (*training, "export_t5"), reason,
                       keys=("device", "common.device"))
    elif args.export_t5:
        cli.reject_ignored(args, "--export_t5", training, reason)
    elif args.code_hits:
        raise ConfigError("--code_hits", "has no effect without --compare",
                          fix="add --compare, or leave out --code_hits")
    elif args.run:
        raise ConfigError("--run", "has no effect on training", "--run selects the run to export",
                          "add --export_item_embeddings or --export_t5, or leave out --run")


def check_training(config: Config, seeds: str | None) -> None:
    """Raise ConfigError if `select_by` is not the name of a metric, or if --seeds is combined with --seed."""
    name, where = config.training_params["select_by"], config.origins[f"{config.name}.training_params.select_by"]
    if name not in metrics.names():
        raise ConfigError(where, f"unknown metric {name!r}", nearest(name, metrics.names()),
                          f"write <metric>@<cutoff>, such as ndcg@10; metrics: {', '.join(metrics.METRICS)}; "
                          f"cutoffs: {', '.join(map(str, metrics.CUTOFFS))}")
    check_baseline_keys(config)
    if seeds is not None and (seed := config.origins["common.seed"]).startswith("--"):
        raise ConfigError("--seeds", f"cannot be combined with {seed}", fix="leave out one of them")


def check_baseline_keys(config: Config) -> None:
    """Raise ConfigError if a key of the prior or the teacher has no effect."""
    for key, why, flag in (
            ("teacher_weight", "The model has no teacher", "--teacher counting"),
            ("teacher_temperature", "The model has no teacher", "--teacher counting"),
            ("neighbours_from", "The model, its prior and its teacher do not compare items", "--prior counting")):
        where = config.origins[f"{config.name}.training_params.{key}"]
        if where.startswith("--") and not applies(config, key):
            raise ConfigError(where, "has no effect", why, f"add {flag}, or leave it out")


def without_run_list(argv: list[str]) -> list[str]:
    """Return the arguments in `argv` without --run_list and its value. A run does not record this flag."""
    pairs = pairwise(["", *argv])
    return [word for before, word in pairs if before != "--run_list" and word.partition("=")[0] != "--run_list"]


def parse_seeds(text: str) -> list[int]:
    """Parse a text such as `1,2,3` into a list of seeds. Raises ConfigError if a seed is invalid or occurs twice."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError("--seeds", f"must be integers separated by commas, got {text!r}",
                          fix="write --seeds 1,2,3") from error
    low, high = BOUNDS["seed"]
    if len(set(seeds)) < len(seeds) or min(seeds) < low or max(seeds) > high:
        raise ConfigError("--seeds", f"must be distinct integers from {low} to {high}, got {text!r}",
                          fix="write --seeds 1,2,3")
    return seeds

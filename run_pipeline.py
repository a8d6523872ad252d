"""Run all stages: prepare the data, make the semantic IDs, and train a recommender and the baselines. Then print the
results, and explain the semantic IDs.

Each configuration key of the stages quantization and recommendation is also a flag: --quantization.KEY value or
--recommendation.KEY value. If only one stage has the key, --KEY value is enough. A baseline ignores the recommendation
keys that it does not use."""

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent)

# The import path must be set before these imports.
from common.cli import ROOT, Parser, add_shared_flags, check_name, given_flags, parse  # noqa: E402
from common.command import run_command  # noqa: E402
from common.errors import ConfigError, nearest  # noqa: E402
from common.output import flush, show  # noqa: E402
from common.steps import Step, module, run_steps, script  # noqa: E402


def main(argv: list[str]) -> None:
    from dataloader.flags import fill_flags

    parser = make_parser()
    args = parse(parser, argv, open_ended=True)
    filled = fill_flags(args, argv)
    with tempfile.TemporaryDirectory(prefix="run-pipeline-") as scratch:
        steps = plan(parser, args, Path(scratch) / "runs")
        from common.run import log_to_console

        log_to_console()
        if filled:
            show(f"data: {filled}")
            flush(sys.stdout)
        run_steps(steps)


def make_parser() -> Parser:
    from dataloader.flags import add_data_flags
    from quantization import models as quantizers
    from recommendation import models as recommenders

    parser = Parser(prog="run_pipeline.sh", description=__doc__)
    add_shared_flags(parser)
    add_data_flags(parser)
    parser.add_argument("--run_root", type=Path, default=ROOT / "runs", metavar="DIR", help="the folder with the runs")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q",
                        help=f"the quantizer: one of {', '.join(quantizers.names())}")
    baselines = " and ".join(recommenders.baselines())
    parser.add_argument("--model", default="encoder_decoder", metavar="M",
                        help=f"the recommender: one of {', '.join(recommenders.names())}; {baselines} always run too")
    parser.add_argument("--filter_seen", nargs="?", const="true", default=None, metavar="true|false|auto",
                        help="whether the items of the history are excluded when the checkpoint is selected and when "
                             "the model recommends; both ways are always tested")
    parser.add_argument("--device", default="auto", metavar="DEV",
                        help="the device to compute on: auto, cpu, cuda or cuda:<n>")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the seed of all random numbers")
    return parser


def plan(parser: Parser, args: argparse.Namespace, run_list: Path) -> list[Step]:
    """Return the steps of the whole pipeline, in the order in which they run.

    run_list: a temporary file; each recommendation step adds its run folder to it, and the results step reads it

    Raises ConfigError if a name or a key is unknown.
    """
    from dataloader.flags import make_parser as make_data_parser
    from dataloader.options import resolve_options
    from dataloader.pipeline import plan as plan_data
    from recommendation import models as recommenders

    check_name("--quantizer_name", args.quantizer_name)
    options = resolve_options(args)
    if use_source_defaults(options.process.config, args):
        options = resolve_options(args)
    keys = split_keys(args)
    data_flags = make_data_parser("").destinations()
    steps = plan_data(options, given_flags(parser, args, data_flags))
    if options.check:
        return steps
    for suffix in _other_suffixes(args.quantizer_name, options.suffix, keys["quantization"]):
        # Flags such as --pca apply only to the embedding that --suffix names.
        other = argparse.Namespace(**{**vars(args), "suffix": suffix, "pca": None, "whiten": False, "zscore": False,
                                      "l2": False})
        titles = {step.title for step in steps}
        steps += [step for step in plan_data(resolve_options(other), given_flags(parser, other, data_flags))
                  if step.title not in titles]
    shared = given_flags(parser, args, {"dataset", "data_root", "debug", "run_root"})
    codes = ["--quantizer_name", args.quantizer_name, "--embedding_suffix", options.suffix]
    training = [*codes, *shared, *given_flags(parser, args, {"force", "seed", "device"})]
    listed = ["--run_list", str(run_list)]
    models = {",".join(name for name in recommenders.baselines() if name != args.model): "baselines",
              args.model: "recommendation"}
    return [
        *steps,
        Step(f"quantization: {args.quantizer_name}", script("quantization/main.py", *training,
                                                            *as_flags(keys["quantization"]))),
        *(Step(f"recommendation: {names}", script("recommendation/main.py", "--model", names, *training, *listed,
                                                  *given_flags(parser, args, {"filter_seen"}), *as_flags(keys[of])))
          for names, of in models.items()),
        Step("results", module("recommendation.results", *listed, *codes, *shared)),
        Step("explain the semantic IDs", script("quantization/main.py", "--explain", *codes, *shared)),
    ]


def use_source_defaults(source: dict, args: argparse.Namespace) -> bool:
    """Set the flags and keys under `pipeline` in the YAML of the dataset's source, and return whether there are any.

    A key begins with the name of a quantizer, and applies only to it. If the command line selects an embedding, nothing
    is set.
    """
    given = any((args.suffix, args.modalities, args.fusion_weights, args.pca, args.whiten, args.zscore, args.l2))
    defaults = {} if given else source.get("pipeline", {})
    vars(args).update({name: value for name, value in defaults.items() if "." not in name})
    # Keys of the command line come later, so they override these.
    args.overrides = [(f"quantization.{key}", str(value)) for key, value in defaults.items()
                      if key.startswith(f"{args.quantizer_name}.")] + args.overrides
    return bool(defaults)


def split_keys(args: argparse.Namespace) -> dict[str, list[tuple[str, str]]]:
    """Group the configuration keys of the command line by what they apply to.

    Returns a dict with three lists of `(key, text)` pairs: for the quantizer ("quantization"), for the model
    ("recommendation"), and for the baselines that always run ("baselines"). Raises ConfigError if a key is unknown, if
    both stages have it, or if its value is wrong.
    """
    from common.config import resolve
    from quantization import models as quantizers
    from recommendation import models as recommenders

    def yamls(stage, name: str):
        return name, stage.config_path(name), stage.DEFAULTS

    stages = {"quantization": yamls(quantizers, args.quantizer_name), "recommendation": yamls(recommenders, args.model)}
    configs = {stage: resolve(*of_stage, []) for stage, of_stage in stages.items()}
    keys: dict[str, list[tuple[str, str]]] = {stage: [] for stage in stages}
    for key, text in args.overrides:
        stage, _, own = key.partition(".")
        if stage not in stages:
            found, own = [stage for stage, config in configs.items() if config.has_key(key)], key
            if len(found) > 1:
                raise ConfigError(f"--{key}", "is ambiguous: both stages have this key",
                                  fix="use " + " or ".join(f"--{stage}.{key}" for stage in found))
            if not found:
                known = {name for config in configs.values() for name in config.leaf_names()} | set(args.flags)
                raise ConfigError(f"--{key}", "unknown flag or configuration key", nearest(key, sorted(known)))
            [stage] = found
        keys[stage].append((own, text))
    for stage, of_stage in stages.items():
        try:
            resolve(*of_stage, keys[stage])
        except ConfigError as error:
            raise _with_stage(error, stage, args.overrides) from error
    keys["baselines"] = [(key, text) for key, text in keys["recommendation"]
                         if any(resolve(*yamls(recommenders, name), []).has_key(key)
                                for name in recommenders.baselines() if name != args.model)]
    return keys


def _with_stage(error: ConfigError, stage: str, overrides: list[tuple[str, str]]) -> ConfigError:
    """Return the error with the flag that the user wrote, for example --recommendation.lr instead of --lr."""
    flag = str(error.where)
    key = f"{stage}.{flag.removeprefix('--')}"
    if key not in dict(overrides):
        return error
    return ConfigError(f"--{key}", error.what, error.why, re.sub("--(?!help)", f"--{stage}.", error.fix))


def as_flags(keys: list[tuple[str, str]]) -> list[str]:
    return [f"--set={key}={text}" for key, text in keys]


def _other_suffixes(quantizer_name: str, suffix: str, keys: list[tuple[str, str]]) -> list[str]:
    """Return the suffixes of all embeddings that the quantizer reads, except `suffix`.

    Raises an error if the quantizer needs another file, such as imported IDs, and this file does not exist.
    """
    from common.config import resolve
    from quantization.models import DEFAULTS, config_path, find_class

    config = resolve(quantizer_name, config_path(quantizer_name), DEFAULTS, keys)
    quantizer = find_class(quantizer_name)
    quantizer.other_files(config.values)
    return [other for other in quantizer.embedding_suffixes(config.values, suffix) if other != suffix]


if __name__ == "__main__":
    sys.exit(run_command(main))

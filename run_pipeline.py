"""Run all stages: prepare the data, make the semantic IDs, and train a recommender and the baselines. Then print the
results, and explain the semantic IDs.

Each configuration key of the stages quantization and recommendation is also a flag: --quantization.KEY value or
--recommendation.KEY value. If only one stage has the key, --KEY value is enough. A baseline ignores the recommendation
keys that it does not use."""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent)

# The import path must be set before these imports.
from common.cli import ROOT, Parser, add_shared_flags, check_name, given_flags, parse  # noqa: E402
from common.command import run_command  # noqa: E402
from common.errors import ConfigError, nearest  # noqa: E402
from common.output import flush, show  # noqa: E402
from common.steps import Step, module, run_steps, script  # noqa: E402

# Defaults, if the dataset's source names no others.
MODEL, QUANTIZER = "encoder_decoder", "rqvae"


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
    parser.add_argument("--quantizer_name", default=None, metavar="Q",
                        help=f"the quantizer: one of {', '.join(quantizers.names())} (default: {QUANTIZER}, or the "
                             "one that the dataset's source names together with its default model)")
    *first, last = recommenders.baselines()
    baselines = f"{', '.join(first)} and {last}"
    parser.add_argument("--model", default=None, metavar="M",
                        help=f"the recommender: one of {', '.join(recommenders.names())}; {baselines} always run too "
                             f"(default: {MODEL}, or the one that the dataset's source names)")
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
    from common.artifacts import FUSIONS, SUFFIXES
    from dataloader.flags import make_parser as make_data_parser
    from dataloader.options import check_fusion_flags, resolve_options
    from dataloader.pipeline import plan as plan_data
    from recommendation import models as recommenders

    use_source_defaults(resolve_options(args).process.config.get("pipeline", {}), args)
    check_name("--quantizer_name", args.quantizer_name)
    options = resolve_options(args)
    baselines = [name for name in recommenders.baselines() if name != args.model]
    keys = split_keys(args, baselines)
    data_flags = make_data_parser("").destinations()
    steps = plan_data(options, given_flags(parser, args, data_flags))
    if options.check:
        return steps
    others = [*_other_suffixes(args.quantizer_name, options.suffix, keys["quantization"]),
              *_neighbour_suffix(keys["recommendation"] + keys["baselines"],
                                [options.suffix, *SUFFIXES, *options.folder.suffixes()])]
    check_fusion_flags(args, [options.suffix, *others])
    for suffix in filter(SUFFIXES.__contains__, others):  # others, such as an export of item vectors, must exist
        # Flags such as --pca apply only to the embedding that --suffix names.
        other = argparse.Namespace(**{**vars(args), "suffix": suffix, "pca": None, "whiten": False, "zscore": False,
                                      "l2": False})
        if suffix not in FUSIONS:
            other.fusion_parts = other.fusion_weights = None
        titles = {step.title for step in steps}
        steps += [step for step in plan_data(resolve_options(other), given_flags(parser, other, data_flags))
                  if step.title not in titles]
    shared = given_flags(parser, args, {"dataset", "data_root", "debug", "run_root"})
    codes = ["--quantizer_name", args.quantizer_name, "--embedding_suffix", options.suffix]
    training = [*codes, *shared, *given_flags(parser, args, {"force", "seed", "device"})]
    listed = ["--run_list", str(run_list)]
    recipe = [] if args.recipe is None else ["--config", str(ROOT / args.recipe)]
    models = [(",".join(baselines), "baselines", []), (args.model, "recommendation", recipe)]
    return [
        *steps,
        Step(f"quantization: {args.quantizer_name}", script("quantization/main.py", *training,
                                                            *as_flags(keys["quantization"]))),
        *(Step(f"recommendation: {names}", script("recommendation/main.py", "--model", names, *config, *training,
                                                  *listed, *given_flags(parser, args, {"filter_seen"}),
                                                  *as_flags(keys[of])))
          for names, of, config in models),
        Step("results", module("recommendation.results", *listed, *codes, *shared)),
        Step("explain the semantic IDs", script("quantization/main.py", "--explain", *codes, *shared)),
    ]


def use_source_defaults(defaults: dict, args: argparse.Namespace) -> None:
    """Set the flags and keys that the command line does not give.

    defaults: the entry `pipeline` in the YAML of the dataset's source. A key that begins with the name of a quantizer
        applies only to it. An entry with the name of a dataset has its model, the quantizer of this model, and the
        model's recipe, a file for --config. They are not used if the command line names another model.
    """
    of_dataset = defaults.get(args.dataset, {})
    if args.model not in (None, of_dataset.get("model")):
        of_dataset = {}
    args.model = args.model or of_dataset.get("model", MODEL)
    args.quantizer_name = args.quantizer_name or of_dataset.get("quantizer_name", QUANTIZER)
    args.recipe = of_dataset.get("recipe")
    # Keys of the command line come later, so they override these.
    args.overrides = [(f"quantization.{key}", str(value)) for key, value in defaults.items()
                      if key.startswith(f"{args.quantizer_name}.")] + args.overrides
    if any((args.suffix, args.modalities, args.pca, args.whiten, args.zscore, args.l2)):
        return  # the command line selects an embedding
    # The weights of a fusion belong to its parts.
    names = ["suffix", "fusion_parts"] + ["fusion_weights"] * (args.fusion_parts is None)
    vars(args).update({name: defaults[name] for name in names if name in defaults and vars(args)[name] is None})


def split_keys(args: argparse.Namespace, baselines: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Group the configuration keys of the command line by what they apply to.

    baselines: names of the baselines that run in addition to the model

    Returns a dict with three lists of `(key, text)` pairs: for the quantizer ("quantization"), for the model
    ("recommendation"), and for the baselines ("baselines"). Raises ConfigError if a key is unknown, if both stages have
    it, or if its value is wrong.
    """
    from quantization import models as quantizers
    from recommendation import models as recommenders
    from recommendation.options import check_training

    def of_recommender(pairs: list[tuple[str, str]]):
        return _config(recommenders, args.model, pairs, args.recipe)

    model, others = of_recommender([]), [_config(recommenders, name) for name in baselines]
    given = _keys_of_stages(args, {"quantization": [_config(quantizers, args.quantizer_name)],
                                   "recommendation": [model, *others]})
    with _naming_stage("quantization", args.overrides):
        _config(quantizers, args.quantizer_name, given["quantization"])
    with _naming_stage("recommendation", args.overrides):
        model = of_recommender([pair for pair in given["recommendation"] if model.has_key(pair[0])])
        of_baselines = [pair for pair in given["recommendation"]
                        if any(recommenders.applies(config, pair[0]) for config in others)]
        # The model would refuse a key that has an effect only on baselines.
        of_model = [pair for pair in given["recommendation"]
                    if recommenders.applies(model, pair[0]) or pair not in of_baselines]
        check_training(of_recommender(of_model + _filter_seen(args)), None)
        for config in others:
            _config(recommenders, config.name, [pair for pair in of_baselines if config.has_key(pair[0])])
    return {"quantization": given["quantization"], "recommendation": of_model, "baselines": of_baselines}


def _filter_seen(args: argparse.Namespace) -> list[tuple[str, str]]:
    return [] if args.filter_seen is None else [("filter_seen", args.filter_seen)]


def _config(stage, name: str, keys: Sequence[tuple[str, str]] = (), recipe: str | None = None):
    """Return the configuration of a model; `stage` is the module quantization.models or recommendation.models.

    recipe: a YAML file that replaces that of the model, relative to the repository
    """
    from common.config import resolve

    own = stage.config_path(name)
    return resolve(name, own if recipe is None else ROOT / recipe, stage.DEFAULTS, list(keys), declared_yaml=own)


def _keys_of_stages(args: argparse.Namespace, configs: dict[str, list]) -> dict[str, list[tuple[str, str]]]:
    """Return the `(key, text)` pairs of each stage, without the name of the stage.

    configs: stage -> configurations of the models that run

    Raises ConfigError if no stage or both stages have a key.
    """
    from recommendation.options import unknown_key

    given: dict[str, list[tuple[str, str]]] = {stage: [] for stage in configs}
    for key, text in args.overrides:
        stage, _, own = key.partition(".")
        if stage not in configs:
            found, own = [stage for stage, of_stage in configs.items()
                          if any(config.has_key(key) for config in of_stage)], key
            if len(found) > 1:
                raise ConfigError(f"--{key}", "is ambiguous: both stages have this key",
                                  fix="use " + " or ".join(f"--{stage}.{key}" for stage in found))
            if not found:
                raise unknown_key(key, [of_stage[0] for of_stage in configs.values()], args.flags)
            [stage] = found
        given[stage].append((own, text))
    return given


@contextmanager
def _naming_stage(stage: str, overrides: list[tuple[str, str]]) -> Iterator[None]:
    """In a ConfigError, name the flag as the user wrote it, for example --recommendation.lr instead of --lr."""
    try:
        yield
    except ConfigError as error:
        flag = str(error.where)
        key = f"{stage}.{flag.removeprefix('--')}"
        if key not in dict(overrides):
            raise
        raise ConfigError(f"--{key}", error.what, error.why, re.sub("--(?!help)", f"--{stage}.", error.fix)) from error


def as_flags(keys: list[tuple[str, str]]) -> list[str]:
    return [f"--set={key}={text}" for key, text in keys]


def _other_suffixes(quantizer_name: str, suffix: str, keys: list[tuple[str, str]]) -> list[str]:
    """Return the suffixes of all embeddings that the quantizer reads, except `suffix`.

    Raises an error if the quantizer needs another file, such as imported IDs, and this file does not exist.
    """
    from quantization import models

    config, quantizer = _config(models, quantizer_name, keys), models.find_class(quantizer_name)
    quantizer.other_files(config.values)
    return [other for other in quantizer.embedding_suffixes(config.values, suffix) if other != suffix]


def _neighbour_suffix(keys: list[tuple[str, str]], suffixes: list[str]) -> list[str]:
    """Return the suffix of the embedding that --neighbours_from names; empty if it names none.

    suffixes: of the embeddings that exist or can be made

    Raises ConfigError if the suffix is not one of them.
    """
    given = [text for key, text in keys if key.rpartition(".")[2] == "neighbours_from"]
    if not given:
        return []
    from recommendation.inputs import AUTO, TFIDF

    [name], known = given[-1:], [AUTO, TFIDF, *dict.fromkeys(suffixes)]
    if name not in known:
        raise ConfigError("--neighbours_from", f"the dataset has no embedding {name!r}", nearest(name, known),
                          f"use one of {', '.join(known)}")
    return [] if name in (AUTO, TFIDF) else [name]


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Train and test recommenders on a dataset; compare and export finished runs."""

import logging
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command import run_command  # noqa: E402 (needs the path above)

log = logging.getLogger("recommendation")


def main(argv: list[str]) -> None:
    from recommendation.options import read_flags, split_models

    jobs = [(*read_flags(own), own) for own in split_models(argv)]  # check the flags of all models first

    from common.run import log_to_console

    log_to_console()
    if len(jobs) > 1:
        check_inputs(jobs)
    for job in jobs:
        run(*job)


def check_inputs(jobs: list[tuple]) -> None:
    """Raise an error if a model has no usable semantic IDs or source of neighbours, before any model is trained.

    jobs: for each model, the arguments of `run`
    """
    from common.artifacts import load_codes
    from recommendation.inputs import neighbour_sources

    for args, config, _ in jobs:
        folder, choice = inputs_of(args)
        neighbour_sources(config, folder)
        if choice.needs_codes:
            load_codes(folder, *choice[1:])


def inputs_of(args) -> tuple:
    """Return the folder of the dataset, and the `Choice` of the flags."""
    from common.artifacts import DatasetFolder

    folder = DatasetFolder(args.data_root, args.dataset)
    folder.require()

    from recommendation.inputs import Choice

    return folder, Choice(args.model, args.quantizer_name, args.embedding_suffix, args.tag)


def run(args, config, argv: list[str]) -> None:
    """Do what the flags of one model say.

    args, config: the flags in `argv` and the configuration, see `read_flags`
    """
    from common.artifacts import dataset_line
    from common.cli import command_line
    from recommendation.options import without_run_list

    folder, choice = inputs_of(args)
    command = command_line("python recommendation/main.py", without_run_list(argv))
    if args.compare:
        from common.output import show
        from recommendation.compare import compare

        show(compare(folder, args.run_root, args.code_hits))
    elif args.export_item_embeddings:
        from recommendation.export.item_embeddings import export_item_embeddings

        device = config["common"]["device"] if config.origins["common.device"].startswith("--") else None
        export_item_embeddings(folder, choice, args.run_root, args.export_item_embeddings, device, command, args.force,
                               args.run)
    elif args.export_t5:
        from recommendation.export.t5 import export_t5

        export_t5(folder, choice, args.run_root, args.export_t5, args.run)
    else:
        from recommendation.pipeline import Pipeline

        log.info("recommendation: %s", dataset_line(folder))
        train(config, lambda: Pipeline(config, folder, choice, args.run_root, command, args.from_t5), args.seeds,
              args.run_list, args.force)


def train(config, make_pipeline, seeds: list[int] | None, run_list: Path | None, force: bool) -> None:
    """Train and test a recommender once, or once for each of `seeds`. Log a table of metrics."""
    from common.distributed import is_main
    from common.targets import append_line
    from recommendation.pipeline import run_seeds
    from recommendation.report import seeds_table, table

    prior = config.training_params["prior"]
    if seeds is not None:
        summary = run_seeds(config, seeds, make_pipeline, force)
        log.info("\n%s\n", seeds_table(config.name, summary, prior))
        return
    pipeline = make_pipeline()
    if run_list and is_main():  # write before the training, so that a file error is raised at once
        append_line(run_list, str(pipeline.run.folder.resolve()))
    metrics = pipeline.execute(force)
    log.info("\n%s\n\nrecommendation: wrote %s", table({config.name: metrics}, {config.name: prior}),
             pipeline.run.folder)


if __name__ == "__main__":
    sys.exit(run_command(main))

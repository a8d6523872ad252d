"""What recommendation/main.py does: train, compare, export."""

import argparse
import logging

from common.artifacts import DatasetFolder
from common.config import Config
from common.distributed import is_main
from recommendation.runs import Choice

log = logging.getLogger(__name__)


def run(args: argparse.Namespace, config: Config, folder: DatasetFolder, command: str) -> None:
    """The one thing that the flags ask for."""
    choice = Choice(args.model, args.quantizer_name, args.embedding_suffix, args.tag)
    if args.compare:
        from recommendation.results import compare

        print(compare(folder, args.run_root))
    elif args.export_item_embeddings:
        from recommendation.export.item_embeddings import export_item_embeddings

        export_item_embeddings(config, folder, choice, args.run_root, args.export_item_embeddings, command, args.force)
    elif args.export_t5:
        from recommendation.export.t5 import export_t5

        export_t5(folder, args)
    else:
        train(args, config, folder, command)


def train(args: argparse.Namespace, config: Config, folder: DatasetFolder, command: str) -> None:
    """Train and test with the one seed or with several, and print the table."""
    from recommendation.pipeline import Pipeline
    from recommendation.report import seeds_table, table
    from recommendation.seeds import run_seeds

    def pipeline() -> Pipeline:
        return Pipeline(config, folder, args.quantizer_name, args.embedding_suffix, args.tag, args.run_root, command,
                        args.from_t5)

    if args.seeds is not None:
        summary = run_seeds(config, args.seeds, pipeline, args.force)
        log.info("\n%s\n", seeds_table(args.model, summary))
    else:
        one = pipeline()
        if args.run_list and is_main():  # before training: a file that cannot be written costs no training
            with args.run_list.open("a", encoding="utf-8") as file:
                file.write(f"{one.run.folder.resolve()}\n")
        metrics = one.execute(args.force)
        log.info("\n%s\n\nrecommendation: wrote %s", table({args.model: metrics}), one.run.folder)

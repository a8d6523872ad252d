"""Train a quantizer on a data set's embeddings and write every item's semantic ID."""

import logging
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import run_command  # noqa: E402 (the path comes first)


def main(argv: list[str]) -> None:
    from common.artifacts import DatasetFolder, variant
    from common.cli import command_line, parse
    from common.config import resolve
    from quantization.models import CONFIGS, config_path

    args = parse(make_parser(argv), argv, open_ended=True)
    name = args.quantizer_name.lower()
    config = resolve(name, args.config or config_path(name), CONFIGS / "defaults.yaml", args.overrides, args.flags)
    folder = DatasetFolder(args.data_root, args.dataset)
    folder.require()
    train(args, config, folder, variant(name, args.embedding_suffix, args.tag),
          command_line("python quantization/main.py", argv))


def make_parser(argv: list[str]):
    """The flags; with --help, the keys of the chosen quantizer's YAML stand below them."""
    from common.cli import Parser, add_config_flags, add_shared_flags, add_variant_flags, help_with_keys
    from quantization.models import CONFIGS, names

    parser = Parser(prog="quantization/main.py", description=__doc__)
    parser.add_argument("--quantizer_name", "--model_name", default="rqvae", metavar="Q",
                        help=f"one of {', '.join(names())}")
    add_shared_flags(parser)
    add_variant_flags(parser)
    add_config_flags(parser)
    help_with_keys(parser, [CONFIGS / "defaults.yaml", CONFIGS / "rqvae_config.yaml"])
    return parser


def train(args, config, folder, variant: str, command: str) -> None:
    """Everything after the checks that need no heavy import."""
    import torch

    from common.device import resolve_device
    from common.run import Run, log_to_console
    from quantization.dataset import Embeddings
    from quantization.models import find_class
    from quantization.trainer import Trainer, is_published

    log_to_console()
    log = logging.getLogger("quantization")
    device = resolve_device(config["common"]["device"], config.origins["common.device"])
    model_class = find_class(config.name)
    embeddings = Embeddings.load(folder, model_class.embedding_suffixes(config.values, args.embedding_suffix))
    model_config = config.for_model(num_items=len(embeddings.xs), inputs=embeddings.inputs)
    torch.manual_seed(config["common"]["seed"])
    model = model_class(model_config, input_size=embeddings.xs.shape[1])
    config.check_all_read(model_config)
    run = Run(args.run_root / "quantization" / args.dataset / variant, config.values, embeddings.hashes, command)
    codes = folder.codes(config.name, args.embedding_suffix, args.tag)
    if run.finished and not args.force and is_published(codes, run.id):
        log.info("quantization: reusing %s (run %s is finished; --force repeats it)", codes, run.id)
        run.make_latest()
        return
    with run.open(args.force):
        trainer = Trainer(model, embeddings, config, run, device)
        figures = trainer.train()
        meta = trainer.publish(codes, command, {"run": run.id, "quantizer": config.name})
        run.finish({"figures": figures, "codebook_sizes": meta["codebook_sizes"]})
    log.info("quantization: %s on %s: collision rate %.4f, after disambiguation %.4f; use of the codebooks %s",
             config.name, args.dataset, meta["collision_rate_before"], meta["collision_rate_after"],
             " ".join(f"{share:.0%}" for share in figures["utilization"]))
    log.info("quantization: wrote %s; codebook sizes %s", codes, meta["codebook_sizes"])


if __name__ == "__main__":
    sys.exit(run_command(main))

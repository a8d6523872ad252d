"""The data stage: download and process a dataset, and make the embeddings that --suffix and --modalities select."""

import sys

from common.artifacts import FUSIONS
from common.command import run_command
from common.run import log_to_console
from common.steps import Step, module, run_steps
from dataloader.options import Options, parse_options


def main(argv: list[str]) -> None:
    options = parse_options(argv, __doc__)
    log_to_console()
    run_steps(plan(options, argv))


def plan(options: Options, flags: list[str]) -> list[Step]:
    """Return the steps for these options. Every step gets all flags, and uses the flags that it needs."""
    if options.check:
        return [Step("data: check", module("dataloader.process", *flags))]
    steps = [("download", "download"), ("interactions and item text", "process")]
    if "image" in options.modalities:
        steps.append(("images", "images"))
    if "text" in options.modalities:
        suffix = options.text.target.suffix
        steps.append(("text embeddings" if suffix == "td" else f"text embeddings {suffix}", "text_embedding"))
    if "image" in options.modalities:
        steps.append(("image embeddings", "image_embedding"))
    if options.suffix in ("cf", *FUSIONS):
        steps.append((f"{options.suffix} embeddings", "fusion"))
    return [Step(f"data: {title}", module(f"dataloader.{name}", *flags)) for title, name in steps]


if __name__ == "__main__":
    sys.exit(run_command(main))

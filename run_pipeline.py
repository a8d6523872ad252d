"""The whole job: data -> semantic IDs -> recommender, with the floors beside it, and the table of results."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent)

from common.cli import ROOT, Parser, add_shared_flags, check_name, parse  # noqa: E402 (the path comes first)
from common.errors import Interrupted, run_command, stop_request  # noqa: E402

log = logging.getLogger("common.pipeline")

FLOORS = ("popularity", "markov")


def main(argv: list[str]) -> None:
    args = parse(make_parser(), argv)
    check(args)
    from common.run import log_to_console

    log_to_console()
    steps = plan(args)
    started = time.monotonic()
    for number, (title, command) in enumerate(steps, start=1):
        log.info("[%d/%d] %s", number, len(steps), title)
        begun = time.monotonic()
        run(command)
        log.info("[%d/%d] took %.0f s\n", number, len(steps), time.monotonic() - begun)
    log.info("all done in %.0f s", time.monotonic() - started)


def make_parser() -> Parser:
    from dataloader.options import add_data_flags
    from quantization import models as quantizers
    from recommendation import models as recommenders

    parser = Parser(prog="run_pipeline.sh", description=__doc__)
    add_shared_flags(parser)
    add_data_flags(parser)
    parser.add_argument("--run_root", type=Path, default=ROOT / "runs", metavar="DIR", help="where runs are written")
    parser.add_argument("--quantizer_name", default="rqvae", metavar="Q",
                        help=f"one of {', '.join(quantizers.names())}")
    parser.add_argument("--model", default="encoder_decoder", metavar="M",
                        help=f"one of {', '.join(recommenders.names())}; {' and '.join(FLOORS)} run beside it")
    parser.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda, cuda:<n>")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of quantizer and recommender")
    return parser


def check(args) -> None:
    """Find every wrong name before the first step writes anything."""
    from dataloader.options import resolve_options
    from quantization import models as quantizers
    from recommendation import models as recommenders

    check_name("--quantizer_name", args.quantizer_name)
    resolve_options(args)
    quantizers.config_path(args.quantizer_name)
    recommenders.config_path(args.model)


def plan(args) -> list[tuple[str, list[str]]]:
    """Title and command of every step."""
    shared = ["--dataset", args.dataset] + (["--debug"] if args.debug else [])
    if args.data_root != ROOT / "data":
        shared += ["--data_root", str(args.data_root)]
    force = ["--force"] if args.force else []
    data = [f"--{key}={value}" for key in ("source", "raw_dir", "mirror", "min_user_interactions",
                                           "min_item_interactions", "text_model")
            if (value := getattr(args, key)) is not None]
    data += [*shared, *force]
    runs = shared + (["--run_root", str(args.run_root)] if args.run_root != ROOT / "runs" else [])
    training = [*runs, *force] + (["--seed", str(args.seed)] if args.seed else [])
    if args.device != "auto":
        data, training = [*data, "--device", args.device], [*training, "--device", args.device]
    models = [*(floor for floor in FLOORS if floor != args.model), args.model]
    codes = ["--quantizer_name", args.quantizer_name]
    recommend = [(f"recommendation: {model}", script("recommendation/main.py", "--model", model, *codes, *training))
                 for model in models]
    return [
        ("data: download", module("dataloader.download", *data)),
        ("data: interactions and item text", module("dataloader.process", *data)),
        ("data: text embeddings", module("dataloader.text_embedding", *data)),
        (f"quantization: {args.quantizer_name}",
         script("quantization/main.py", *codes, *training)),
        *recommend,
        ("results", module("recommendation.report", "--models", ",".join(models), *codes, *runs)),
    ]


def module(name: str, *flags: str) -> list[str]:
    # -P keeps the caller's folder, which may be another checkout, off the import path.
    return [sys.executable, "-P", "-m", name, *flags]


def script(path: str, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / path), *flags]


def run(command: list[str]) -> None:
    """Wait for a step; hand a stop request on to it, so that it can save; leave with its exit code if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])}
    with stop_request, subprocess.Popen(command, env=environment) as child:
        handed_on = False
        while child.poll() is None:
            try:
                child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stop_request.requested and not handed_on:
                    handed_on = True
                    if stop_request.signal_number != signal.SIGINT:  # the terminal sends that one to both
                        child.send_signal(stop_request.signal_number)
    if stop_request.requested:
        raise Interrupted()
    if child.returncode:
        sys.exit(child.returncode if child.returncode > 0 else 128 - child.returncode)


if __name__ == "__main__":
    sys.exit(run_command(main))

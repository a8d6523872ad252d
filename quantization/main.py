"""Train a quantizer on the item embeddings of a dataset, and write the semantic IDs of the items.

With --compare, --explain or --export, nothing is trained; existing semantic IDs are shown or exported.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command import run_command  # noqa: E402 (needs the path above)


def main(argv: list[str]) -> None:
    from common.artifacts import DatasetFolder
    from common.cli import command_line, parse, reject_ignored
    from common.config import resolve
    from quantization.models import DEFAULTS, config_path

    args = parse(make_parser(argv), argv, open_ended=True)
    name = args.quantizer_name.lower()
    own = config_path(name)
    config = resolve(name, args.config or own, DEFAULTS, args.overrides, args.flags, own)
    folder = DatasetFolder(args.data_root, args.dataset)
    folder.require()
    if args.compare or args.explain or args.export:
        reject_ignored(args, "--compare, --explain, --export", ("config", "strict", "force"),
                       "These flags do not train; they only read existing semantic IDs")
        show_existing(args, folder, name)
    else:
        from quantization.pipeline import Options, train

        options = Options(args.run_root, args.embedding_suffix, args.tag, args.force, args.strict)
        train(config, folder, options, command_line("python quantization/main.py", argv))


def make_parser(argv: list[str]):
    """Return the argument parser. --help also shows the configuration keys of the quantizer in `argv`."""
    from common.cli import Parser, add_config_flags, add_shared_flags, add_variant_flags, help_with_keys, value_of
    from quantization.models import CONFIGS, DEFAULTS, names

    parser = Parser(prog="quantization/main.py", description=__doc__)
    parser.add_argument("--quantizer_name", "--model_name", default="rqvae", metavar="Q",
                        help=f"the quantizer: one of {', '.join(names())}")
    add_shared_flags(parser)
    add_variant_flags(parser)
    add_config_flags(parser)
    parser.add_argument("--strict", action="store_true", help="stop with an error if a codebook has collapsed")
    parser.add_argument("--compare", action="store_true", help="print a table of all finished runs of the dataset")
    parser.add_argument("--explain", action="store_true",
                        help="print what the codes mean, and write an HTML page for browsing them")
    parser.add_argument("--export", type=Path, default=None, metavar="DIR",
                        help="export to the folder DIR: JSON files in the format of LC-Rec (semantic IDs, items, user "
                             "sequences), and a CSV table of the semantic IDs")
    name = value_of(argv, ("--quantizer_name", "--model_name"), "rqvae").lower()
    help_with_keys(parser, [DEFAULTS,
                            CONFIGS / f"{name if name in names() else 'rqvae'}_config.yaml"])
    return parser


def show_existing(args, folder, name: str) -> None:
    """Compare, explain or export existing semantic IDs, depending on the flags. Nothing is trained."""
    from common.output import show

    if args.compare:
        from quantization.compare import compare

        show(compare(folder, args.run_root))
    if args.explain:
        from common.artifacts import variant
        from quantization.inspection.page import explain

        parent = args.run_root / "quantization" / folder.name / variant(name, args.embedding_suffix, args.tag)
        page = parent / "explain.html"
        show(explain(folder, name, args.embedding_suffix, args.tag, page))
    if args.export:
        from quantization.export import export

        for path in export(folder, name, args.embedding_suffix, args.tag, args.export):
            show(f"quantization: wrote {path}")


if __name__ == "__main__":
    sys.exit(run_command(main))

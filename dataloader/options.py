"""The flags of the data part. All its steps take the same ones, so that one line serves every step."""

from pathlib import Path
from typing import NamedTuple

from common.artifacts import DatasetFolder
from common.cli import Parser, add_force_flag, add_shared_flags, parse
from common.config import load_yaml
from common.errors import ConfigError, nearest

CONFIGS = Path(__file__).resolve().parent / "configs"
SOURCES = ("amazon14", "amazon18", "movielens")  # a data set that several have is taken from the first


class DataOptions(NamedTuple):
    """What the steps need to know, flags and the source's YAML put together."""

    folder: DatasetFolder
    source: str
    config: dict
    raw: Path            # the folder of the raw files
    downloads: bool      # whether `raw` is filled by us
    mirror: str | None
    min_user_interactions: int
    min_item_interactions: int
    text_model: str
    device: str
    force: bool


def add_data_flags(parser: Parser) -> None:
    add_force_flag(parser)
    parser.add_argument("--source", choices=SOURCES, default=None,
                        help="where the data set is from (default: the first of these that has it)")
    parser.add_argument("--raw_dir", type=Path, default=None, metavar="DIR",
                        help="a folder of raw files that are there already; nothing is downloaded")
    parser.add_argument("--mirror", default=None, metavar="URL", help="is asked first, for URL/<file name>")
    for side, named in (("user", "a user"), ("item", "an item")):
        parser.add_argument(f"--min_{side}_interactions", type=int, default=None, metavar="N",
                            help=f"k-core: events that {named} needs; 0 switches it off "
                                 "(default: the source's YAML, 5)")
    parser.add_argument("--text_model", default="all-MiniLM-L6-v2", metavar="M",
                        help="sentence-transformers model, by name or path")


def parse_options(argv: list[str], description: str) -> DataOptions:
    """Read the flags of a step. Raises ConfigError before anything is written."""
    parser = Parser(description=description, prog="dataloader")
    add_shared_flags(parser)
    add_data_flags(parser)
    parser.add_argument("--device", default="auto", help="where the text model runs")
    return resolve_options(parse(parser, argv))


def resolve_options(args) -> DataOptions:
    configs = {name: load_yaml(CONFIGS / f"{name}.yaml")[0] for name in SOURCES}
    source = args.source or _source_of(args.dataset, args.raw_dir, configs)
    config = configs[source]
    if args.raw_dir is None and args.dataset not in config["datasets"]:
        raise ConfigError(f"--dataset {args.dataset}", f"{source} has no such data set",
                          nearest(args.dataset, config["datasets"]), "correct the name, or --source")
    if args.raw_dir is not None and not args.raw_dir.is_dir():
        raise ConfigError(f"--raw_dir {args.raw_dir}", "is not a folder", fix="name the folder of the raw files")
    folder = DatasetFolder(args.data_root, args.dataset)
    minima = {}
    for key in ("min_user_interactions", "min_item_interactions"):
        given = getattr(args, key)
        minima[key] = config[key] if given is None else given
        if minima[key] < 0:
            raise ConfigError(f"--{key}", f"is {given}", "it must be at least 0", "correct the value")
    # A folder a source: the years of a category share file names.
    return DataOptions(folder, source, config, args.raw_dir or folder.path / "raw" / source, args.raw_dir is None,
                       args.mirror, **minima, text_model=args.text_model,
                       device=getattr(args, "device", "auto"), force=args.force)


def _source_of(dataset: str, raw_dir: Path | None, configs: dict[str, dict]) -> str:
    for name, config in configs.items():
        if dataset in config["datasets"]:
            return name
    if raw_dir is not None:
        return "amazon18"  # the reader tells the years apart by the metadata's syntax
    known = sorted({d for config in configs.values() for d in config["datasets"]})
    raise ConfigError(f"--dataset {dataset}", "no source has such a data set", nearest(dataset, known),
                      "correct the name, or --raw_dir DIR for files of your own")

"""The flags of the data part. All its steps take the same ones, so that one line serves every step."""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from common.artifacts import DatasetFolder
from common.cli import Parser, add_force_flag, add_shared_flags, check_name, parse
from common.config import load_yaml
from common.errors import ConfigError, nearest
from dataloader.sources import find_source

CONFIGS = Path(__file__).resolve().parent / "configs"
SOURCES = ("amazon14", "amazon18", "amazon23", "movielens", "local")  # a data set that several have: the first
MODALITIES = ("text", "image")
FUSIONS = ("fused-concat", "fused-pca", "fused-align")
ITEM_FIELDS = ("title", "description", "brand", "price", "categories", "features", "image")


class Processing(NamedTuple):
    """How raw events and items become tables."""

    min_rating: float | None
    duplicates: str
    min_user_interactions: int
    min_item_interactions: int
    drop_items_without_text: bool
    template: tuple[str, ...]      # the pieces of an item's text
    split: str
    split_ratios: tuple[float, ...]
    split_dates: tuple[str, ...]
    time_unit: str
    bad_lines: str

    @property
    def settings(self) -> dict:
        """What the tables depend on, as their metas record it (and JSON gives it back)."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in self._asdict().items()}
        unused = {"leave_one_out": ("split_ratios", "split_dates"),
                  "temporal": ("split_ratios",) if self.split_dates else ("split_dates",)}[self.split]
        return {key: value for key, value in values.items() if key not in unused}


class Local(NamedTuple):
    """A user's own files: where they are (None: found in --raw_dir), and the names of their columns."""

    interactions: Path | None
    items: Path | None
    columns: dict[str, str | None]       # user, item, time, rating
    item_columns: dict[str, str | None]  # item and ITEM_FIELDS


class Transform(NamedTuple):
    """What is done with the embedding that --suffix names, in this order."""

    pca: int | None
    whiten: bool
    zscore: bool
    l2: bool


class TextOptions(NamedTuple):
    model: str
    api_url: str | None
    api_rate: float


class ImageOptions(NamedTuple):
    model: str
    rate: float
    min_side: int
    missing: str


class FusionOptions(NamedTuple):
    parts: tuple[str, ...]
    weights: tuple[float, ...]  # one a part
    dim: int


class DataOptions(NamedTuple):
    """What the steps need to know, flags and the source's YAML put together."""

    folder: DatasetFolder
    source: str
    config: dict
    raw: Path            # the folder of the raw files
    downloads: bool      # whether `raw` is filled by us
    mirror: str | None
    processing: Processing
    local: Local
    memory_limit: str
    check: bool
    adopt: bool
    export_recbole: Path | None
    modalities: tuple[str, ...]
    suffix: str          # the embedding that the next stage reads
    transform: Transform
    text: TextOptions
    image: ImageOptions
    fusion: FusionOptions
    seed: int
    device: str
    force: bool

    def transform_of(self, suffix: str) -> Transform:
        """The transform flags belong to the embedding that --suffix names; parts of a fusion are left alone."""
        return self.transform if suffix == self.suffix else Transform(None, False, False, False)

    @property
    def text_suffix(self) -> str:
        """What step 3 makes: `td`, or the user's own name for it."""
        return "td" if self.suffix in ("image", "cf", *FUSIONS) else self.suffix


def add_data_flags(parser: Parser) -> None:
    """Every flag of every step, so that the whole job takes them too."""
    add_force_flag(parser)
    _add_source_flags(parser.add_argument_group("where the data are from"))
    _add_local_flags(parser.add_argument_group("files of your own (--source local)"))
    _add_processing_flags(parser.add_argument_group("processing"))
    _add_embedding_flags(parser.add_argument_group("embeddings"))


def _add_source_flags(group) -> None:
    group.add_argument("--source", choices=SOURCES, default=None,
                       help="where the data set is from (default: the first of these that has it; "
                            "with --raw_dir, what the files there look like)")
    group.add_argument("--raw_dir", type=Path, default=None, metavar="DIR",
                       help="a folder of raw files that are there already; nothing is downloaded")
    group.add_argument("--mirror", default=None, metavar="URL", help="is asked first, for URL/<file name>")


def _add_local_flags(group) -> None:
    for name in ("interactions", "items"):
        group.add_argument(f"--{name}", type=Path, default=None, metavar="FILE",
                           help=f"CSV, TSV, JSON lines or Parquet (default: {name}.* or the RecBole file in --raw_dir)")
    for column, default in (("user", "user_id"), ("item", "item_id"), ("time", "timestamp"), ("rating", "rating")):
        group.add_argument(f"--{column}_column", default=None, metavar="C",
                           help=f"in the interactions (default: {default}"
                                + ("; it may be missing)" if column == "rating" else ")"))
    group.add_argument("--item_id_column", default=None, metavar="C",
                       help="in the items (default: as --item_column)")
    for field in ITEM_FIELDS:
        group.add_argument(f"--{field}_column", default=None, metavar="C",
                           help=f"in the items (default: {field}, if there)")


def _add_processing_flags(group) -> None:
    group.add_argument("--time_unit", choices=("s", "ms", "us", "date"), default=None,
                       help="of the raw time stamps; date is ISO 8601 (default: the source's YAML)")
    group.add_argument("--bad_lines", choices=("fail", "skip"), default="fail",
                       help="skip: leave out at most 1 %% of lines that cannot be read, and list them")
    group.add_argument("--min_rating", type=float, default=None, metavar="R", help="leave out events rated lower")
    group.add_argument("--duplicates", choices=("keep", "exact", "user_item"), default="keep",
                       help="exact: one event for a user, item and time; user_item: a user's first event with an item")
    for side, named in (("user", "a user"), ("item", "an item")):
        group.add_argument(f"--min_{side}_interactions", type=int, default=None, metavar="N",
                           help=f"k-core: events that {named} needs; 0 switches it off "
                                "(default: the source's YAML, 5)")
    group.add_argument("--template", default="td", metavar="T",
                       help="an item's text: a template of the source's YAML, or pieces like "
                            "'{title} | by {brand}', each left out where its field is empty")
    group.add_argument("--drop_items_without_text", action="store_true",
                       help="leave such items out; else their raw ids stand in for the text")
    group.add_argument("--split", choices=("leave_one_out", "temporal"), default="leave_one_out",
                       help="leave_one_out: a user's last event is test, the one before it valid; "
                            "temporal: one moment for all users")
    group.add_argument("--split_ratios", default="0.8,0.1,0.1", metavar="A,B,C",
                       help="temporal: shares of train, valid and test")
    group.add_argument("--split_dates", default=None, metavar="D1,D2",
                       help="temporal: when valid and when test begin (ISO 8601, UTC), in place of the ratios")
    group.add_argument("--memory_limit", default="2GB", metavar="M",
                       help="what DuckDB holds in memory; beyond it goes to the disk")
    group.add_argument("--check", action="store_true",
                       help="only look whether the data set's folder, and raw files that are named, are sound; "
                            "nothing is written")
    group.add_argument("--adopt", action="store_true",
                       help="with --check: give sound files of your own the metas that the other stages ask for")
    group.add_argument("--export_recbole", type=Path, default=None, metavar="DIR",
                       help="also write RecBole's atomic files there")


def _add_embedding_flags(group) -> None:
    group.add_argument("--modalities", default=None, metavar="M",
                       help="text, image or text,image (default: what --suffix needs; text)")
    group.add_argument("--suffix", "--embedding_suffix", dest="suffix", default=None, metavar="S",
                       help=f"the embedding that the next stage reads: image, cf, {', '.join(FUSIONS)}, or a name "
                            "for a text embedding (default: td; fused-concat with text,image)")
    group.add_argument("--text_model", default="all-MiniLM-L6-v2", metavar="M",
                       help="sentence-transformers model, by name or path; tfidf (no model at all); or api:<name>")
    group.add_argument("--api_url", default=None, metavar="URL",
                       help="OpenAI-compatible endpoint (default: $OPENAI_BASE_URL, else OpenAI's); "
                            "its key is taken from $OPENAI_API_KEY")
    group.add_argument("--api_rate", type=float, default=5.0, metavar="R", help="requests a second")
    group.add_argument("--pca", type=int, default=None, metavar="N", help="reduce to so many dimensions")
    group.add_argument("--whiten", action="store_true", help="with --pca: every dimension to unit variance")
    group.add_argument("--zscore", action="store_true", help="every dimension to mean 0 and deviation 1")
    group.add_argument("--l2", action="store_true", help="every vector to length 1")
    group.add_argument("--image_model", default="clip-ViT-B-32", metavar="M", help="CLIP model, by name or path")
    group.add_argument("--image_rate", type=float, default=20.0, metavar="R", help="image requests a second")
    group.add_argument("--min_image_side", type=int, default=10, metavar="N",
                       help="pixels; a smaller image is a placeholder, and counts as missing")
    group.add_argument("--missing_images", choices=("mask", "error"), default="mask",
                       help="mask: such an item gets the mean vector and is marked in the mask file")
    group.add_argument("--fusion_parts", default="td,image", metavar="S,S", help="the embeddings that are fused")
    group.add_argument("--fusion_weights", default=None, metavar="W,W", help="one a part (default: all 1)")
    group.add_argument("--fusion_dim", type=int, default=128, metavar="N", help="of fused-pca and fused-align")


def parse_options(argv: list[str], description: str) -> DataOptions:
    """Read the flags of a step. Raises ConfigError before anything is written."""
    parser = make_parser(description)
    return resolve_options(parse(parser, argv))


def make_parser(description: str) -> Parser:
    parser = Parser(description=description, prog="dataloader")
    add_shared_flags(parser)
    add_data_flags(parser)
    parser.add_argument("--device", default="auto", help="where models run")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn at random")
    return parser


def resolve_options(args: argparse.Namespace) -> DataOptions:
    local = _local(args)
    for flag, path in (("--raw_dir", args.raw_dir), ("--interactions", args.interactions), ("--items", args.items)):
        if path is not None and not (path.is_dir() if flag == "--raw_dir" else path.is_file()):
            raise ConfigError(f"{flag} {path}", f"is not a {'folder' if flag == '--raw_dir' else 'file'}",
                              fix="correct the path")
    configs = {name: load_yaml(CONFIGS / f"{name}.yaml")[0] for name in SOURCES}
    folder = DatasetFolder(args.data_root, args.dataset)
    source = args.source or find_source(args.dataset, args.raw_dir, args.interactions, configs, folder.interactions)
    config = configs[source]
    downloads = args.raw_dir is None and args.interactions is None
    if downloads and args.dataset not in config["datasets"] and not folder.interactions.exists():
        raise ConfigError(f"--dataset {args.dataset}", f"{source} has no such data set",
                          nearest(args.dataset, config["datasets"]) if config["datasets"] else
                          "its files are not named", "correct the name or --source, or name the files: --raw_dir DIR")
    modalities, suffix = _modalities(args)
    # A folder a source: the years of a category share file names.
    raw = args.raw_dir or (args.interactions.parent if args.interactions else folder.path / "raw" / source)
    return DataOptions(
        folder, source, config, raw, downloads, args.mirror, _processing(args, config), local,
        _checked("--memory_limit", args.memory_limit, re.fullmatch(r"\d+(\.\d+)? ?[KMGT]i?B", args.memory_limit),
                 "a size, such as 2GB"),
        args.check, args.adopt, args.export_recbole, modalities, suffix, _transform(args),
        TextOptions(args.text_model, args.api_url, _positive("--api_rate", args.api_rate)),
        ImageOptions(args.image_model, _positive("--image_rate", args.image_rate),
                     _positive("--min_image_side", args.min_image_side), args.missing_images),
        _fusion(args), args.seed, getattr(args, "device", "auto"), args.force)


def _local(args: argparse.Namespace) -> Local:
    columns = {name: getattr(args, f"{name}_column") for name in ("user", "item", "time", "rating")}
    item_columns = {"item": args.item_id_column or args.item_column,
                    **{field: getattr(args, f"{field}_column") for field in ITEM_FIELDS}}
    local = Local(args.interactions, args.items, columns, item_columns)
    given = [flag for flag, value in (("--interactions", local.interactions), ("--items", local.items),
                                      *((f"--{n}_column", v) for n, v in columns.items()),
                                      *((f"--{n}_column", v) for n, v in item_columns.items() if n != "item"))
             if value is not None]
    if given and args.source not in (None, "local"):
        raise ConfigError(given[0], f"has no meaning for --source {args.source}",
                          "it names a user's own files", "--source local, or leave it out")
    return local


def _processing(args: argparse.Namespace, config: dict) -> Processing:
    minima = [_at_least_zero(f"--{key}", getattr(args, key) if getattr(args, key) is not None else config[key])
              for key in ("min_user_interactions", "min_item_interactions")]
    ratios = _numbers("--split_ratios", args.split_ratios, 3)
    _checked("--split_ratios", args.split_ratios, min(ratios) > 0 and abs(sum(ratios) - 1) < 1e-6,
             "three shares above 0 that sum to 1")
    dates = tuple(args.split_dates.split(",")) if args.split_dates else ()
    if dates:
        in_order = len(dates) == 2 and all(map(_is_date, dates)) and dates[0] < dates[1]
        _checked("--split_dates", args.split_dates, in_order,
                 "two dates, the earlier first, such as 2014-01-01,2014-03-01")
    if dates and args.split != "temporal":
        raise ConfigError("--split_dates", "belongs to the temporal split", fix="--split temporal")
    return Processing(args.min_rating, args.duplicates, *minima, args.drop_items_without_text,
                      _template(args.template, config), args.split, ratios, dates,
                      args.time_unit or config["time_unit"], args.bad_lines)


def _template(name: str, config: dict) -> tuple[str, ...]:
    if "{" not in name:
        if name not in config["templates"]:
            raise ConfigError(f"--template {name}", "no such template", nearest(name, list(config["templates"])),
                              "a template of the source's YAML, or pieces like '{title} | by {brand}'")
        return tuple(config["templates"][name])
    pieces = tuple(piece.strip() for piece in name.split("|"))
    known = list(config["items"])
    for piece in pieces:
        fields = re.findall(r"{(.*?)}", piece)
        unknown = [field for field in fields if field not in known or field in ("item", "image")]
        if not fields or unknown:
            raise ConfigError(f"--template {name}", f"{piece!r} names " + (repr(unknown[0]) if unknown else "no field"),
                              "there are: " + ", ".join(f for f in known if f not in ("item", "image")),
                              "correct the name")
    return pieces


def _modalities(args: argparse.Namespace) -> tuple[tuple[str, ...], str]:
    """What is made, and the suffix of what the next stage reads; each follows from the other if it is not given."""
    check_name("--suffix", args.suffix)
    given = tuple(args.modalities.split(",")) if args.modalities else ()
    if unknown := [m for m in given if m not in MODALITIES]:
        raise ConfigError(f"--modalities {args.modalities}", f"no such modality as {unknown[0]!r}",
                          nearest(unknown[0], list(MODALITIES)), "text, image or text,image")
    suffix = args.suffix or ("fused-concat" if len(given) > 1 else "image" if given == ("image",) else "td")
    parts = args.fusion_parts.split(",") if suffix in FUSIONS else [suffix]
    needed = tuple(m for m in MODALITIES if any(m == modality_of(part) for part in parts))
    if given and (lacking := [m for m in needed if m not in given]):
        raise ConfigError(f"--modalities {args.modalities}", f"lacks {lacking[0]}", f"--suffix {suffix} needs it",
                          f"--modalities {','.join(needed)}, or leave it out")
    return tuple(m for m in MODALITIES if m in (given or needed)), suffix


def modality_of(suffix: str) -> str | None:
    """What a plain embedding is made from; a text embedding may have any name that nothing else has."""
    return {"image": "image", "cf": None, **dict.fromkeys(FUSIONS)}.get(suffix, "text")


def _transform(args: argparse.Namespace) -> Transform:
    if args.pca is not None:
        _positive("--pca", args.pca)
    elif args.whiten:
        raise ConfigError("--whiten", "needs the number of dimensions", fix="--pca N --whiten")
    return Transform(args.pca, args.whiten, args.zscore, args.l2)


def _fusion(args: argparse.Namespace) -> FusionOptions:
    parts = tuple(args.fusion_parts.split(","))
    for part in parts:
        check_name("--fusion_parts", part)
    _checked("--fusion_parts", args.fusion_parts, len(parts) > 1 and len(set(parts)) == len(parts)
             and not set(parts) & set(FUSIONS), "two different embeddings or more, such as td,image")
    weights = (1.0,) * len(parts)
    if args.fusion_weights:
        weights = _numbers("--fusion_weights", args.fusion_weights, len(parts))
    _checked("--fusion_weights", args.fusion_weights, min(weights) > 0, "weights above 0")
    return FusionOptions(parts, weights, _positive("--fusion_dim", args.fusion_dim))


def _numbers(flag: str, text: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    _checked(flag, text, len(numbers) == count, f"{count} numbers with commas between them")
    return numbers


def _is_date(text: str) -> bool:
    return re.fullmatch(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?)?", text) is not None


def _positive(flag: str, value):
    return _checked(flag, value, value > 0, "it must be above 0")


def _at_least_zero(flag: str, value):
    return _checked(flag, value, value >= 0, "it must be at least 0")


def _checked(flag: str, value, good: object, wanted: str):
    if not good:
        raise ConfigError(flag, f"is {value}", f"wanted: {wanted}" if not wanted.startswith("it ") else wanted,
                          "correct the value")
    return value

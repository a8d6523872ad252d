"""What the flags and the source's YAML say together, checked: all that a step needs to know."""

import argparse
import re
from functools import cache
from pathlib import Path
from string import Formatter
from typing import NamedTuple
from urllib.parse import urlsplit

from common.artifacts import DatasetFolder
from common.cli import check_name, parse
from common.config import BOUNDS, load_yaml
from common.errors import ConfigError, closest, nearest
from dataloader.flags import DEFAULT_RATIOS, FUSIONS, ITEM_FIELDS, MODALITIES, SOURCES, make_parser
from dataloader.sources import find_source
from dataloader.values import above_zero, at_least_zero, checked, finite, moment, numbers

CONFIGS = Path(__file__).resolve().parent / "configs"


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
        """What step 3 makes: `td`, or the user's own name for it, which may be a part of a fusion."""
        suffixes = self.fusion.parts if self.suffix in FUSIONS else (self.suffix,)
        return next((suffix for suffix in suffixes if modality_of(suffix) == "text"), "td")


def parse_options(argv: list[str], description: str) -> DataOptions:
    """Read the flags of a step. Raises ConfigError before anything is written."""
    return resolve_options(parse(make_parser(description), argv))


def resolve_options(args: argparse.Namespace) -> DataOptions:
    """Raises ConfigError for a value that cannot be, and for a flag that the others leave without a meaning."""
    _refuse_missing_paths(args)
    _refuse_without_check(args)
    folder = DatasetFolder(args.data_root, args.dataset)
    source, config = _source(args, folder)
    modalities, suffix = _modalities(args)
    # A folder a source: the years of a category share file names.
    raw = args.raw_dir or (args.interactions.parent if args.interactions else folder.path / "raw" / source)
    low, high = BOUNDS["seed"]
    return DataOptions(
        folder=folder, source=source, config=config, raw=raw, downloads=_downloads(args), mirror=_mirror(args.mirror),
        processing=_processing(args, config), local=_local(args, source), memory_limit=_memory_limit(args.memory_limit),
        check=args.check, adopt=args.adopt, export_recbole=args.export_recbole, modalities=modalities, suffix=suffix,
        transform=_transform(args),
        text=TextOptions(args.text_model, args.api_url, above_zero("--api_rate", args.api_rate)),
        image=ImageOptions(args.image_model, above_zero("--image_rate", args.image_rate),
                           above_zero("--min_image_side", args.min_image_side), args.missing_images),
        fusion=_fusion(args),
        seed=checked("--seed", args.seed, low <= args.seed <= high, f"it must be from {low} to {high}"),
        device=checked("--device", args.device, re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", args.device),
                       "auto, cpu, cuda or cuda:<n>"),
        force=args.force)


def _downloads(args: argparse.Namespace) -> bool:
    return args.raw_dir is None and args.interactions is None


def _mirror(url: str | None) -> str | None:
    """Raises ConfigError, which does not repeat the address: it may hold a password."""
    parts = urlsplit(url or "")
    if url is not None and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ConfigError("--mirror", "is not an http or https address", fix="--mirror https://HOST/FOLDER")
    return url


@cache
def _configs(folder: Path) -> dict[str, dict]:
    return {name: load_yaml(folder / f"{name}.yaml")[0] for name in SOURCES}


def _refuse_missing_paths(args: argparse.Namespace) -> None:
    for flag, path in (("--raw_dir", args.raw_dir), ("--interactions", args.interactions), ("--items", args.items)):
        if path is not None and not (path.is_dir() if flag == "--raw_dir" else path.is_file()):
            raise ConfigError(f"{flag} {path}", f"is not a {'folder' if flag == '--raw_dir' else 'file'}",
                              fix="correct the path")
    target = args.export_recbole
    if target is not None and target.exists() and not target.is_dir():
        raise ConfigError(f"--export_recbole {target}", "is not a folder", fix="name a folder")


def _source(args: argparse.Namespace, folder: DatasetFolder) -> tuple[str, dict]:
    """Where the data set is from, by the flag, by its files or by its name; and what the YAML of that source says."""
    configs = _configs(CONFIGS)
    there = folder.interactions.exists()
    try:
        source = args.source or find_source(args.dataset, args.raw_dir, args.interactions, configs, folder.interactions)
    except ConfigError:
        if args.raw_dir is not None or not there:
            raise
        source = "local"  # tables that a user has put there: nothing records where they are from
    known = configs[source]["datasets"]
    if _downloads(args) and args.dataset not in known and not there:
        close = closest(args.dataset, known)
        raise ConfigError(f"--dataset {args.dataset}", f"{source} has no such data set",
                          nearest(args.dataset, known) if known else "its files are not named",
                          f"--dataset {close}" if close else
                          "correct the name or --source, or name the files: --raw_dir DIR")
    return source, configs[source]


def _refuse_without_check(args: argparse.Namespace) -> None:
    if args.adopt and not args.check:
        raise ConfigError("--adopt", "belongs to --check", "what is not sound is not adopted", "--check --adopt")
    if args.check and args.export_recbole is not None:
        raise ConfigError("--export_recbole", "has no meaning beside --check", "which writes nothing",
                          "leave one of the two out")


def _local(args: argparse.Namespace, source: str) -> Local:
    columns = {name: getattr(args, f"{name}_column") for name in ("user", "item", "time", "rating")}
    item_columns = {"item": args.item_id_column, **{field: getattr(args, f"{field}_column") for field in ITEM_FIELDS}}
    given = {"--interactions": args.interactions, "--items": args.items,
             **{f"--{name}_column": column for name, column in columns.items()},
             **{f"--{'item_id' if name == 'item' else name}_column": c for name, c in item_columns.items()}}
    unused = [flag for flag, value in given.items() if value is not None]
    if unused and source != "local":
        raise ConfigError(unused[0], f"has no meaning for {args.dataset}, which is from {source}",
                          "it names a user's own files", "--source local, or leave it out")
    return Local(args.interactions, args.items, columns,
                 {**item_columns, "item": args.item_id_column or args.item_column})


def _processing(args: argparse.Namespace, config: dict) -> Processing:
    minima = [at_least_zero(f"--{key}", getattr(args, key) if getattr(args, key) is not None else config[key])
              for key in ("min_user_interactions", "min_item_interactions")]
    if args.min_rating is not None:
        finite("--min_rating", args.min_rating)
    return Processing(args.min_rating, args.duplicates, *minima, args.drop_items_without_text,
                      _template(args.template, config), args.split, *_split(args),
                      args.time_unit or config["time_unit"], args.bad_lines)


def _split(args: argparse.Namespace) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """The ratios and the dates of a temporal split."""
    for flag, value in (("--split_ratios", args.split_ratios), ("--split_dates", args.split_dates)):
        if value is not None and args.split != "temporal":
            raise ConfigError(flag, "belongs to the temporal split", fix="--split temporal")
    if args.split_dates is not None and args.split_ratios is not None:
        raise ConfigError("--split_dates", "takes the place of --split_ratios", fix="leave one of the two out")
    ratios = DEFAULT_RATIOS if args.split_ratios is None else numbers("--split_ratios", args.split_ratios, 3)
    checked("--split_ratios", args.split_ratios, min(ratios) > 0 and abs(sum(ratios) - 1) < 1e-6,
            "three shares above 0 that sum to 1")
    dates = () if args.split_dates is None else tuple(args.split_dates.split(","))
    moments = list(map(moment, dates))
    checked("--split_dates", args.split_dates,
            not dates or (len(dates) == 2 and None not in moments and moments[0] < moments[1]),
            "two dates, the earlier first, such as 2014-01-01,2014-03-01")
    return ratios, dates


def _template(name: str, config: dict) -> tuple[str, ...]:
    """The pieces that a template's name stands for, or those that are spelt out."""
    where = f"--template {name}"
    if "{" not in name:
        if name not in config["templates"]:
            close = closest(name, list(config["templates"]))
            raise ConfigError(where, "no such template", nearest(name, list(config["templates"])),
                              f"--template {close}" if close else
                              "a template of the source's YAML, or pieces like '{title} | by {brand}'")
        return tuple(config["templates"][name])
    known = [field for field in config["items"]["columns"] if field not in ("item", "image")]
    pieces = tuple(piece.strip() for piece in name.split("|"))
    for piece in pieces:
        try:
            fields = [(field, conversion or style) for _words, field, style, conversion in Formatter().parse(piece)
                      if field is not None]
        except ValueError as error:
            raise ConfigError(where, f"{piece!r} is no piece", str(error), "'{title} | by {brand}'") from error
        wrong = [field for field, extra in fields if field not in known or extra]
        if wrong or not fields:
            raise ConfigError(where, f"{piece!r} names " + (repr(wrong[0]) if wrong else "no field"),
                              f"there are: {', '.join(known)}", "correct the name")
    return pieces


def _modalities(args: argparse.Namespace) -> tuple[tuple[str, ...], str]:
    """What is made, and the suffix of what the next stage reads; each follows from the other if it is not given."""
    check_name("--suffix", args.suffix)
    given = set() if args.modalities is None else set(args.modalities.split(","))
    if unknown := sorted(given - set(MODALITIES)):
        raise ConfigError(f"--modalities {args.modalities}", f"no such modality as {unknown[0]!r}",
                          nearest(unknown[0], list(MODALITIES)), "text, image or text,image")
    suffix = args.suffix or ("fused-concat" if len(given) > 1 else "image" if given == {"image"} else "td")
    parts = args.fusion_parts.split(",") if suffix in FUSIONS else [suffix]
    needed = [m for m in MODALITIES if any(m == modality_of(part) for part in parts)]
    if given and (lacking := [m for m in needed if m not in given]):
        raise ConfigError(f"--modalities {args.modalities}", f"lacks {lacking[0]}", f"--suffix {suffix} needs it",
                          f"--modalities {','.join(needed)}, or leave it out")
    return tuple(m for m in MODALITIES if m in (given or needed)), suffix


def modality_of(suffix: str) -> str | None:
    """What a plain embedding is made from; a text embedding may have any name that nothing else has."""
    return {"image": "image", "cf": None, **dict.fromkeys(FUSIONS)}.get(suffix, "text")


def _transform(args: argparse.Namespace) -> Transform:
    if args.pca is not None:
        above_zero("--pca", args.pca)
    elif args.whiten:
        raise ConfigError("--whiten", "needs the number of dimensions", fix="--pca N --whiten")
    return Transform(args.pca, args.whiten, args.zscore, args.l2)


def _fusion(args: argparse.Namespace) -> FusionOptions:
    parts = tuple(args.fusion_parts.split(","))
    for part in parts:
        check_name("--fusion_parts", part)
    checked("--fusion_parts", args.fusion_parts, len(parts) > 1 and len(set(parts)) == len(parts)
            and not set(parts) & set(FUSIONS), "two different embeddings or more, such as td,image")
    weights = (1.0,) * len(parts)
    if args.fusion_weights is not None:
        weights = numbers("--fusion_weights", args.fusion_weights, len(parts))
    checked("--fusion_weights", args.fusion_weights, min(weights) > 0, "weights above 0")
    return FusionOptions(parts, weights, above_zero("--fusion_dim", args.fusion_dim))


def _memory_limit(text: str) -> str:
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?[KMGT]i?B", text, re.IGNORECASE)
    return checked("--memory_limit", text, size and float(size[1]) > 0, "a size, such as 2GB")

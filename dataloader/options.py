"""Check the flags of the data stage, and convert them to the options of each step."""

import argparse
import math
import re
from contextlib import suppress
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import NamedTuple, get_type_hints
from urllib.parse import urlsplit

from common.artifacts import FUSIONS, DatasetFolder
from common.cli import check_name, parse
from common.config import BOUNDS as SHARED_BOUNDS
from common.config import CHOICES, Rules, check_section, load_yaml
from common.errors import ConfigError, closest, nearest
from common.publishing import meta_path
from common.reading import parse_json, read_text
from dataloader.flags import (
    CONFIGS,
    DEFAULT_PARTS,
    DEFAULT_RATIOS,
    FLAGS,
    ITEM_FIELDS,
    MODALITIES,
    OWN_FILES,
    RUN_FLAGS,
    fill_flags,
    make_parser,
    remembered_flags,
    source_configs,
)
from dataloader.readers.folders import listing, readable
from dataloader.readers.lines import first_format

# The smallest and the largest allowed value of each key in fusion.yaml. SHARED_BOUNDS has those of the training loop.
BOUNDS = SHARED_BOUNDS | {"tolerance": (0, 1), "temperature": (1e-3, 10), "min_temperature": (1e-3, 10),
                          "smoothing": (0, None)}


class Processing(NamedTuple):
    """Options that determine how raw events and items are converted to tables."""

    min_rating: float | None
    duplicates: str
    min_user_interactions: int
    min_item_interactions: int
    drop_items_without_text: bool
    template: tuple[str, ...]      # pieces of an item's text
    split: str
    split_ratios: tuple[float, ...]
    split_dates: tuple[str, ...]
    time_unit: str
    time_format: str | None        # the form of the dates, if it is not ISO 8601; `time_unit` is then "date"
    missing_values: tuple[str, ...] | None  # the texts that mean a missing value; None: the defaults
    bad_lines: str

    @property
    def settings(self) -> dict:
        """The options that affect the tables, for the meta files. Tuples become lists, because JSON has no tuples."""
        used = {"split_dates" if self.split_dates else "split_ratios"} if self.split == "temporal" else set()
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self._asdict().items()
                if key in used or key not in ("split_ratios", "split_dates")}


class FileLayout(NamedTuple):
    """The layout of the user's own CSV and TSV files. None means the default of the flag."""

    no_header: str | None  # "interactions", "items" or "both"
    separator: str | None
    items_separator: str | None  # None: the same as `separator`
    quoting: str | None    # "none" or "double"
    escape: str | None

    @property
    def settings(self) -> dict[str, str]:
        return {name: value for name, value in self._asdict().items() if value is not None}


class Local(NamedTuple):
    """The user's own files and the names of their columns.

    If a file is None, it is searched for in --raw_dir. If a column is None, it has the default name.
    """

    interactions: Path | None
    items: Path | None
    columns: dict[str, str | None]       # user, item, time, rating
    item_columns: dict[str, str | None]  # item and ITEM_FIELDS
    layout: FileLayout


class ProcessOptions(NamedTuple):
    """Options of step 2 (process) and of the readers of raw files.

    Step 0 (download) needs these options too: it uses them to check whether the tables are up to date. If they are, it
    downloads nothing.
    """

    folder: DatasetFolder
    source: str
    config: dict         # the source's YAML
    raw: Path            # the folder of the raw files
    downloads: bool      # whether step 0 downloads the files in `raw`
    mirror: str | None
    local: Local
    processing: Processing
    memory_limit: str
    export_recbole: Path | None
    check: bool
    adopt: bool
    force: bool
    flags: dict[str, object]  # the flags to store in source.yaml
    filled: str               # a line for the log that lists the flags taken from source.yaml, or ""


class ImageFetchOptions(NamedTuple):
    """Options of step 1 (fetch images)."""

    folder: DatasetFolder
    rate: float
    min_side: int
    missing: str
    force: bool


class Transform(NamedTuple):
    """Transformations of an embedding's vectors, applied in this order."""

    pca: int | None = None
    whiten: bool = False
    zscore: bool = False
    l2: bool = False


class Embedding(NamedTuple):
    """The embedding that a step makes."""

    folder: DatasetFolder
    suffix: str
    transform: Transform
    path = property(lambda self: self.folder.embeddings(self.suffix))


class TextOptions(NamedTuple):
    """Options of step 3 (text embeddings)."""

    target: Embedding
    model: str
    api_url: str | None
    api_rate: float
    mirror: str | None
    device: str
    force: bool
    folder = property(lambda self: self.target.folder)


class ImageOptions(NamedTuple):
    """Options of step 4 (image embeddings)."""

    target: Embedding
    model: str
    missing: str
    mirror: str | None
    device: str
    force: bool
    folder = property(lambda self: self.target.folder)


class Collaborative(NamedTuple):
    """The section `cf` of configs/fusion.yaml."""

    num_dims: int
    smoothing: float
    oversampling: int
    filter_degree: int
    max_products: int
    tolerance: float


class Alignment(NamedTuple):
    """The section `fused-align` of configs/fusion.yaml; `batch_size` and later keys are for the training loop."""

    temperature: float
    min_temperature: float
    max_held_out: int
    batch_size: int
    epochs: int
    max_steps: int
    lr: float
    lr_schedule: str
    warmup_steps: int
    optimizer: str
    weight_decay: float
    clip_norm: float
    eval_every: int
    patience: int
    checkpoint_seconds: float


class FusionOptions(NamedTuple):
    """Options of step 5 (fused and collaborative embeddings)."""

    target: Embedding
    parts: tuple[str, ...]
    weights: tuple[float, ...]  # one per part
    dim: int
    cf: Collaborative
    align: Alignment
    seed: int
    device: str
    force: bool
    folder = property(lambda self: self.target.folder)


class Options(NamedTuple):
    """Options of the data pipeline and of each of its steps."""

    folder: DatasetFolder
    check: bool
    modalities: tuple[str, ...]
    suffix: str          # embedding that the next stage reads
    process: ProcessOptions
    images: ImageFetchOptions
    text: TextOptions
    image: ImageOptions
    fusion: FusionOptions


def parse_options(argv: list[str], description: str, suffix: str | None = None) -> Options:
    """Parse and check the flags in `argv`, and return the options of all steps. No file is written.

    `suffix` is the default value of --suffix. Raises ConfigError for an unknown flag, a wrong value, or a flag that has
    no effect.
    """
    args = parse(make_parser(description), argv)
    args.filled = fill_flags(args, argv)
    args.suffix = suffix if args.suffix is None else args.suffix
    options = resolve_options(args)
    check_fusion_flags(args, [options.suffix])
    return options


def check_fusion_flags(args: argparse.Namespace, suffixes: list[str]) -> None:
    """Raise ConfigError for a flag of a fusion if none of the embeddings with these suffixes is fused."""
    given = [name for name in ("fusion_parts", "fusion_weights") if getattr(args, name) is not None]
    if given and not set(suffixes) & set(FUSIONS):
        raise ConfigError(f"--{given[0]}", f"has no effect with --suffix {suffixes[0]}",
                          "Only a fused embedding has parts", "add --suffix fused-concat, or leave the flag out")


def resolve_options(args: argparse.Namespace) -> Options:
    """Check the values of the flags, and return the options of all steps.

    Raises ConfigError for a wrong value, and for a flag that has no effect with the other flags.
    """
    for flag in (*RUN_FLAGS, *chain(*FLAGS.values())):
        if flag.is_valid and (value := getattr(args, flag.dest)) is not None:
            _check(flag.names, value, flag.is_valid(value), flag.expected)
    _check_combinations(args)
    folder = DatasetFolder(args.data_root, args.dataset)
    process = _process(args, folder)
    modalities, suffix = _modalities(args)
    parts = _parts(args)
    for part in parts:
        check_name("--fusion_parts", part)
    _check("--fusion_parts", ",".join(parts), len(parts) > 1 and len(set(parts)) == len(parts)
           and not set(parts) & set(FUSIONS), "two or more different embeddings that are not fused, such as td,image")
    weights = ((1.0,) * len(parts) if args.fusion_weights is None else
               _parse_numbers("--fusion_weights", args.fusion_weights, len(parts)))
    _check("--fusion_weights", args.fusion_weights, min(weights) > 0, "weights above 0")
    made = parts if suffix in FUSIONS else (suffix,)
    text_suffix = next((part for part in made if modality_of(part) == "text"), "td")
    fusion_yaml = CONFIGS / "fusion.yaml"
    # The transform flags apply only to the embedding of --suffix.
    transform = Transform(args.pca, args.whiten, args.zscore, args.l2)
    target = {name: Embedding(folder, name, transform if name == suffix else Transform())
              for name in (text_suffix, "image", suffix)}
    return Options(
        folder, args.check, modalities, suffix, process,
        ImageFetchOptions(folder, args.image_rate, args.min_image_side, args.missing_images, args.force),
        TextOptions(target[text_suffix], args.text_model, args.api_url, args.api_rate, args.mirror, args.device,
                    args.force),
        ImageOptions(target["image"], args.image_model, args.missing_images, args.mirror, args.device, args.force),
        FusionOptions(target[suffix], parts, weights, args.fusion_dim,
                      load_section(fusion_yaml, "cf", Collaborative),
                      load_section(fusion_yaml, "fused-align", Alignment), args.seed, args.device, args.force))


def _check(flag: str, value: object, is_valid: object, expected: str) -> None:
    if not is_valid:
        raise ConfigError(flag, f"must be {expected}, got {value}", fix="correct the value")


def _parse_numbers(flag: str, text: str, count: int) -> tuple[float, ...]:
    with suppress(ValueError):
        found = tuple(map(float, text.split(",")))
        if len(found) == count and all(map(math.isfinite, found)):
            return found
    raise ConfigError(flag, f"must be {count} numbers separated by commas, got {text}", fix="correct the value")


def timestamp_of(date: str) -> int | None:
    """Return an ISO 8601 date as Unix time in seconds (UTC if it has no time zone), or None if it is not a date."""
    with suppress(ValueError):
        found = datetime.fromisoformat(date)
        return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())
    return None


def _check_combinations(args: argparse.Namespace) -> None:
    """Raise ConfigError for a wrong path or address, and for flags that cannot be combined or need another flag."""
    for flag, path, kind in (("--raw_dir", args.raw_dir, "folder"), ("--interactions", args.interactions, "file"),
                             ("--items", args.items, "file")):
        if path is not None and not (path.is_dir() if kind == "folder" else path.is_file()):
            raise ConfigError(f"{flag} {path}", f"is not a {kind}", fix="correct the path")
    if (target := args.export_recbole) is not None and target.exists() and not target.is_dir():
        raise ConfigError(f"--export_recbole {target}", "is not a folder", fix="use the path of a folder")
    mirror = urlsplit(args.mirror or "")
    if args.mirror is not None and (mirror.scheme not in ("http", "https") or not mirror.hostname):
        # Do not print the address, because it may contain a password.
        raise ConfigError("--mirror", "must be an http or https address", fix="use --mirror https://HOST/FOLDER")
    if args.escape is not None and args.quoting == "none":
        raise ConfigError("--escape", "has no effect with --quoting none", "The escape is only used in quoted values",
                          "leave out one of the two")
    if args.adopt and not args.check:
        raise ConfigError("--adopt", "has no effect without --check", "Only files that pass the check are adopted",
                          "use --check --adopt")
    if args.check and args.export_recbole is not None:
        raise ConfigError("--export_recbole", "cannot be combined with --check", "The check writes no files",
                          "leave out one of the two")
    if args.time_format is not None and args.time_unit not in (None, "date"):
        raise ConfigError("--time_format", f"cannot be combined with --time_unit {args.time_unit}",
                          "Times in this form are dates", "leave out one of the two")
    if args.whiten and args.pca is None:
        raise ConfigError("--whiten", "has no effect without --pca", fix="use --pca N --whiten")


def _process(args: argparse.Namespace, folder: DatasetFolder) -> ProcessOptions:
    downloads, source = args.raw_dir is None and args.interactions is None, args.source or _find_source(args, folder)
    config = source_configs()[source]
    if downloads and args.dataset not in config["datasets"] and not folder.interactions.exists():
        raise _unknown_name("--dataset", args.dataset, f"unknown dataset for the source {source}", config["datasets"],
                            "correct the name or --source, or pass the folder of its raw files with --raw_dir DIR",
                            "Neither --raw_dir nor --interactions is given")
    # Use one folder per source, because the sources of different years have the same file names for a category.
    raw = args.raw_dir or (args.interactions.parent if args.interactions else folder.path / "raw" / source)
    minima = [config[key] if getattr(args, key) is None else getattr(args, key)
              for key in ("min_user_interactions", "min_item_interactions")]
    processing = Processing(args.min_rating, args.duplicates, *minima, args.drop_items_without_text,
                            _template(args.template, config), args.split, *_split(args),
                            "date" if args.time_format else args.time_unit or config["time_unit"], args.time_format,
                            _missing_values(args.missing_values), args.bad_lines)
    if source != "local":  # ignore remembered flags of other files
        own = {flag.dest for flag in FLAGS[OWN_FILES]} & getattr(args, "filled_flags", set())
        vars(args).update(dict.fromkeys(own))
    unused = [flag.names for flag in FLAGS[OWN_FILES] if getattr(args, flag.dest) is not None]
    if unused and source != "local":
        raise ConfigError(unused[0], f"has no effect with the dataset {args.dataset} of the source {source}",
                          "The flag is only for your own files", "use --source local, or leave the flag out")
    columns, item_columns = ({name: getattr(args, f"{name}_column") for name in names}
                             for names in (("user", "item", "time", "rating"), ITEM_FIELDS))
    item_columns = {"item": args.item_id_column or args.item_column, **item_columns}
    local = Local(args.interactions, args.items, columns, item_columns,
                  FileLayout(args.no_header, args.separator, args.items_separator, args.quoting, args.escape))
    return ProcessOptions(folder, source, config, raw, downloads, args.mirror, local, processing,
                          args.memory_limit, args.export_recbole, args.check, args.adopt, args.force,
                          remembered_flags(args, source), getattr(args, "filled", ""))


def _unknown_name(flag: str, name: str, what: str, known: list[str], fix: str, why_if_none: str = "") -> ConfigError:
    """Return an error for an unknown name. The error suggests the most similar known name.

    If `known` is empty, `why_if_none` is the reason in the error.
    """
    close = closest(name, known)
    return ConfigError(f"{flag} {name}", what, nearest(name, known) if known else why_if_none,
                       f"{flag} {close}" if close else fix)


def _find_source(args: argparse.Namespace, folder: DatasetFolder) -> str:
    """Return the name of the dataset's source, from the raw files, the meta file, or the dataset's name.

    Raises ConfigError if no source is found.
    """
    configs, found = source_configs(), None
    if args.interactions is not None:
        found = "local"
    elif args.raw_dir is not None:
        # Take the first source for which the folder contains a file whose first record has the format of the source.
        found = next((name for name, config in configs.items() for pattern, lines in config["found_by"].items()
                      if re.fullmatch(config["found_names"], args.dataset)
                      for path in args.raw_dir.glob(pattern.format(dataset=args.dataset))
                      if path.is_file() and (lines == "any" or first_format(path) in (lines, ""))), None)
    else:
        with suppress(OSError, ValueError, KeyError, TypeError):  # the meta file is missing or damaged
            found = str(parse_json(read_text(meta_path(folder.interactions)))["settings"]["source"])
    if found not in configs:
        found = next((name for name, config in configs.items() if args.dataset in config["datasets"]), None)
    if found is None and args.raw_dir is not None:
        raise ConfigError(f"--raw_dir {args.raw_dir}", f"contains no known raw file of {args.dataset}",
                          "Known raw files are interactions.* and the files of Amazon, MovieLens and RecBole; the "
                          f"folder has {listing(args.raw_dir)}", readable(args.raw_dir, args.dataset) or
                          "set the source with --source, or pass the files with --interactions FILE --items FILE")
    if found is None and not folder.interactions.exists():
        names = sorted({d for config in configs.values() for d in config["datasets"]})
        raise _unknown_name("--dataset", args.dataset, "unknown dataset", names,
                            "correct the name, or use --raw_dir DIR for your own files")
    return found or "local"  # tables without a recorded source were made by the user


def _split(args: argparse.Namespace) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Return the ratios and the dates of a temporal split."""
    for flag, value in (("--split_ratios", args.split_ratios), ("--split_dates", args.split_dates)):
        if value is not None and args.split != "temporal":
            raise ConfigError(flag, "has no effect without --split temporal", fix="use --split temporal")
    if args.split_dates is not None and args.split_ratios is not None:
        raise ConfigError("--split_dates", "cannot be combined with --split_ratios", fix="leave out one of the two")
    ratios = DEFAULT_RATIOS if args.split_ratios is None else _parse_numbers("--split_ratios", args.split_ratios, 3)
    _check("--split_ratios", args.split_ratios, min(ratios) > 0 and abs(sum(ratios) - 1) < 1e-6,
           "three shares above 0 that sum to 1")
    dates = () if args.split_dates is None else tuple(args.split_dates.split(","))
    seconds = list(map(timestamp_of, dates))
    _check("--split_dates", args.split_dates,
           not dates or (len(dates) == 2 and None not in seconds and seconds[0] < seconds[1]),
           "two dates, the earlier one first, such as 2014-01-01,2014-03-01")
    return ratios, dates


def _missing_values(listed: str | None) -> tuple[str, ...] | None:
    return None if listed is None else tuple(value for value in listed.split(",") if value)


def _template(name: str, config: dict) -> tuple[str, ...]:
    """Return the pieces of a template.

    `name` is the name of a template in the source's YAML, or the pieces themselves, separated by `|`.
    """
    where, templates = f"--template {name}", config["templates"]
    if name in templates:
        return tuple(templates[name])
    if "{" not in name:
        raise _unknown_name("--template", name, "unknown template", list(templates),
                            "use a template of the source's YAML, or pieces such as '{title} | by {brand}'")
    known = [field for field in config["items"]["columns"] if field not in ("item", "image")]
    pieces = tuple(piece.strip() for piece in name.split("|"))
    for piece in pieces:
        try:
            parsed = [part for part in Formatter().parse(piece) if part[1] is not None]
        except ValueError as error:
            raise ConfigError(where, f"the piece {piece!r} of the template is invalid", f"It cannot be parsed: {error}",
                              "write pieces such as '{title} | by {brand}'") from error
        wrong = [field for _words, field, style, conversion in parsed if field not in known or conversion or style]
        if wrong or not parsed:
            raise ConfigError(where, f"the piece {piece!r} of the template has " + (
                              f"the invalid field {wrong[0]!r}" if wrong else "no field"),
                              f"The valid fields are {', '.join(known)}; only the name of a field may be in braces",
                              "write pieces such as '{title} | by {brand}'")
    return pieces


def _modalities(args: argparse.Namespace) -> tuple[tuple[str, ...], str]:
    """Return the modalities to embed, and the suffix.

    The default of --modalities depends on --suffix, and the default of --suffix depends on --modalities.
    """
    check_name("--suffix", args.suffix)
    given = set() if args.modalities is None else set(args.modalities.split(","))
    if unknown := sorted(given - set(MODALITIES)):
        raise ConfigError(f"--modalities {args.modalities}", f"unknown modality {unknown[0]!r}",
                          nearest(unknown[0], list(MODALITIES)), "use text, image or text,image")
    suffix = args.suffix or ("fused-concat" if len(given) > 1 else "image" if given == {"image"} else "td")
    parts = _parts(args) if suffix in FUSIONS else (suffix,)
    needed = [m for m in MODALITIES if any(m == modality_of(part) for part in parts)]
    if given and (missing := [m for m in needed if m not in given]):
        raise ConfigError(f"--modalities {args.modalities}", f"must include {missing[0]}",
                          f"--suffix {suffix} needs it",
                          f"use --modalities {','.join(needed)}, or leave out --modalities")
    return tuple(m for m in MODALITIES if m in (given or needed)), suffix


def _parts(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple((DEFAULT_PARTS if args.fusion_parts is None else args.fusion_parts).split(","))


def modality_of(suffix: str) -> str | None:
    """Return the modality of the embedding with this suffix, or None for `cf` and for fused embeddings.

    The suffix `image` belongs to an image embedding. Any other suffix belongs to a text embedding.
    """
    return {"image": "image", "cf": None, **dict.fromkeys(FUSIONS)}.get(suffix, "text")


def load_section(path: Path, name: str, record: type):
    """Load the section `name` of fusion.yaml as an object of the class `record`.

    Raises ConfigError for an unknown key, a missing key or a wrong value.
    """
    config, origins = load_yaml(path)
    values, kinds = config.get(name), get_type_hints(record)
    if not isinstance(values, dict):
        raise ConfigError(path, f"missing section {name!r}", nearest(name, list(config)), f"add `{name}:` and its keys")
    bounds = {key: BOUNDS.get(key, (1, None)) for key, kind in kinds.items() if kind is not str}
    check_section(values, {key: kind() for key, kind in kinds.items()}, name, origins,
                  Rules(bounds, CHOICES, set(), set(), None))
    if missing := [key for key in kinds if key not in values]:
        raise ConfigError(path, f"missing key {name}.{missing[0]}", fix=f"add {missing[0]}: <value>")
    return record(**values)

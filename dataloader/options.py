"""The flags of the data part, the same for all steps, checked; and the options of each step as a record."""

import argparse
import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import NamedTuple, get_type_hints
from urllib.parse import urlsplit

from common.artifacts import DatasetFolder
from common.cli import Parser, add_force_flag, add_shared_flags, check_name, parse
from common.config import BOUNDS as SHARED_BOUNDS
from common.config import CHOICES, Rules, check_section, load_yaml
from common.errors import ConfigError, closest, nearest
from common.publishing import meta_path
from dataloader.readers.lines import first_format

CONFIGS = Path(__file__).resolve().parent / "configs"
MODALITIES = ("text", "image")
FUSIONS = ("fused-concat", "fused-pca", "fused-align")
DEFAULT_RATIOS = (0.8, 0.1, 0.1)
# What the keys of fusion.yaml may hold, besides those of the training loop.
BOUNDS = SHARED_BOUNDS | {"tolerance": (0, 1), "temperature": (1e-3, 10), "min_temperature": (1e-3, 10),
                          "smoothing": (0, None)}
ITEM_FIELDS = ("title", "description", "brand", "price", "categories", "features", "image")


class Flag(NamedTuple):
    names: str
    help: str
    takes: str | tuple | Callable | None = None  # the metavar, which also tells the type; the choices; bool: nothing
    default: object = None
    is_valid: Callable | None = None  # holds of every good value; one that is not given is not looked at
    expected: str = ""              # how an error says what is good

    dest = property(lambda self: self.names.split()[0].removeprefix("--"))

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        if self.takes is bool:
            kind = {"action": "store_true"}
        elif self.takes is None or isinstance(self.takes, str):
            kind = {"default": self.default, "metavar": self.takes, "type": TYPES.get(self.takes)}
        else:
            kind = {"default": self.default, "choices": list(self.takes() if callable(self.takes) else self.takes)}
        parser.add_argument(*self.names.split(), help=self.help, **kind)


TYPES = {"N": int, "R": float, "DIR": Path, "FILE": Path}


@cache
def source_configs() -> dict[str, dict]:
    """What the YAML of every source says, in the order in which they are asked for a data set."""
    known = {path.stem: load_yaml(path)[0] for path in CONFIGS.glob("*.yaml")}
    sources = [(config["order"], name) for name, config in known.items() if "reader" in config]
    return {name: known[name] for _order, name in sorted(sources)}


ABOVE_0, FROM_0 = (lambda n: n > 0, "it must be above 0"), (lambda n: n >= 0, "it must be at least 0")
OWN_FILES = "files of your own (--source local)"
FLAGS = {
    "where the data are from": [
        Flag("--source", "where the data set is from (default: the first of these that has it; with --raw_dir, what "
             "the files there look like)", source_configs),
        Flag("--raw_dir", "a folder of raw files that are there already; nothing is downloaded", "DIR"),
        Flag("--mirror", "is asked first, for URL/<file name>", "URL")],
    OWN_FILES: [
        *(Flag(f"--{name}", f"CSV, TSV, JSON lines or Parquet (default: {name}.* or the RecBole file in --raw_dir)",
               "FILE") for name in ("interactions", "items")),
        *(Flag(f"--{column}_column", f"in the interactions (default: {default})", "C") for column, default in (
            ("user", "user_id"), ("item", "item_id"), ("time", "timestamp"), ("rating", "rating; it may be missing"))),
        Flag("--item_id_column", "in the items (default: as --item_column)", "C"),
        *(Flag(f"--{field}_column", f"in the items (default: {field}, if there)", "C") for field in ITEM_FIELDS)],
    "processing": [
        Flag("--time_unit", "of the raw time stamps; date is ISO 8601 (default: the source's YAML)",
             ("s", "ms", "us", "date")),
        Flag("--bad_lines", "skip: leave out at most 1 %% of lines that cannot be read, and list them",
             ("fail", "skip"), "fail"),
        Flag("--min_rating", "leave out events rated lower", "R", None, math.isfinite, "it must be finite"),
        Flag("--duplicates", "exact: one event for a user, item and time; user_item: a user's first event with an item",
             ("keep", "exact", "user_item"), "keep"),
        *(Flag(f"--min_{side}_interactions", f"k-core: events that {named} needs; 0 switches it off (default: the "
               "source's YAML, 5)", "N", None, *FROM_0) for side, named in (("user", "a user"), ("item", "an item"))),
        Flag("--template", "an item's text: a template of the source's YAML, or pieces like '{title} | by {brand}', "
             "each left out where its field is empty", "T", "td"),
        Flag("--drop_items_without_text", "leave such items out; else their raw ids stand in for the text", bool),
        Flag("--split", "leave_one_out: a user's last event is test, the one before it valid; temporal: one moment for "
             "all users", ("leave_one_out", "temporal"), "leave_one_out"),
        Flag("--split_ratios", "temporal: shares of train, valid and test (default: "
             f"{','.join(map(str, DEFAULT_RATIOS))})", "A,B,C"),
        Flag("--split_dates", "temporal: when valid and when test begin (ISO 8601, UTC), in place of the ratios",
             "D1,D2"),
        Flag("--memory_limit", "what DuckDB holds in memory; beyond it goes to the disk", "M", "2GB", re.compile(
            r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]i?B", re.IGNORECASE).fullmatch, "a size, such as 2GB"),
        Flag("--check", "only look whether the data set's folder, and raw files that are named, are sound; nothing is "
             "written", bool),
        Flag("--adopt", "with --check: give sound files of your own the metas that the other stages ask for", bool),
        Flag("--export_recbole", "also write RecBole's atomic files there", "DIR")],
    "embeddings": [
        Flag("--modalities", "text, image or text,image (default: what --suffix needs; text)", "M"),
        Flag("--suffix --embedding_suffix", "the embedding that the next stage reads: image, cf, "
             f"{', '.join(FUSIONS)}, or a name for a text embedding (default: td; fused-concat with text,image)", "S"),
        Flag("--text_model", "sentence-transformers model, by name or path; tfidf (no model at all); or api:<name>",
             "M", "all-MiniLM-L6-v2"),
        Flag("--api_url", "OpenAI-compatible endpoint (default: $OPENAI_BASE_URL, else OpenAI's); its key is taken "
             "from $OPENAI_API_KEY", "URL"),
        Flag("--api_rate", "requests a second", "R", 5.0, *ABOVE_0),
        Flag("--pca", "reduce to so many dimensions", "N", None, *ABOVE_0),
        Flag("--whiten", "with --pca: every dimension to unit variance", bool),
        Flag("--zscore", "every dimension to mean 0 and deviation 1", bool),
        Flag("--l2", "every vector to length 1", bool),
        Flag("--image_model", "CLIP model, by name or path", "M", "clip-ViT-B-32"),
        Flag("--image_rate", "image requests a second", "R", 20.0, *ABOVE_0),
        Flag("--min_image_side", "pixels; a smaller image is a placeholder, and counts as missing", "N", 10, *ABOVE_0),
        Flag("--missing_images", "mask: such an item gets the mean vector and is marked in the mask file",
             ("mask", "error"), "mask"),
        Flag("--fusion_parts", "the embeddings that are fused", "S,S", "td,image"),
        Flag("--fusion_weights", "one a part (default: all 1)", "W,W"),
        Flag("--fusion_dim", "of fused-pca and fused-align", "N", 128, *ABOVE_0)]}
RUN_FLAGS = [
    Flag("--device", "where models run", None, "auto", re.compile(r"auto|cpu|mps|cuda(:\d+)?").fullmatch,
         "auto, cpu, cuda or cuda:<n>"),
    Flag("--seed", "of what is drawn at random", "N", 0, lambda n: 0 <= n < 2**31, f"it must be from 0 to {2**31 - 1}")]


def make_parser(description: str) -> Parser:
    parser = Parser(description=description, prog="dataloader")
    add_shared_flags(parser)
    add_data_flags(parser)
    for flag in RUN_FLAGS:
        flag.add_to(parser)
    return parser


def add_data_flags(parser: Parser) -> None:
    """Every flag of every step, so that the whole job takes them too."""
    add_force_flag(parser)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            flag.add_to(group)


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
        used = {"split_dates" if self.split_dates else "split_ratios"} if self.split == "temporal" else set()
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self._asdict().items()
                if key in used or key not in ("split_ratios", "split_dates")}


class Local(NamedTuple):
    """A user's own files: where they are (None: found in --raw_dir), and the names of their columns."""

    interactions: Path | None
    items: Path | None
    columns: dict[str, str | None]       # user, item, time, rating
    item_columns: dict[str, str | None]  # item and ITEM_FIELDS


class ProcessOptions(NamedTuple):
    """Of step 2, of the readers of raw files, and of step 0, which may find that step 2 needs none any more."""

    folder: DatasetFolder
    source: str
    config: dict         # the source's YAML
    raw: Path            # the folder of the raw files
    downloads: bool      # whether step 0 fills `raw`
    mirror: str | None
    local: Local
    processing: Processing
    memory_limit: str
    export_recbole: Path | None
    check: bool
    adopt: bool
    force: bool


class ImageFetchOptions(NamedTuple):
    """Of step 1."""

    folder: DatasetFolder
    rate: float
    min_side: int
    missing: str
    force: bool


class Transform(NamedTuple):
    """What is done with an embedding's vectors, in this order."""

    pca: int | None = None
    whiten: bool = False
    zscore: bool = False
    l2: bool = False


class Embedding(NamedTuple):
    """An embedding that a step makes."""

    folder: DatasetFolder
    suffix: str
    transform: Transform
    path = property(lambda self: self.folder.embeddings(self.suffix))


class TextOptions(NamedTuple):
    """Of step 3."""

    target: Embedding
    model: str
    api_url: str | None
    api_rate: float
    mirror: str | None
    device: str
    force: bool
    folder = property(lambda self: self.target.folder)


class ImageOptions(NamedTuple):
    """Of step 4."""

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
    """The section `fused-align`; from `batch_size` on, what `common.training` knows."""

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
    """Of step 5."""

    target: Embedding
    parts: tuple[str, ...]
    weights: tuple[float, ...]  # one a part
    dim: int
    cf: Collaborative
    align: Alignment
    seed: int
    device: str
    force: bool
    folder = property(lambda self: self.target.folder)


class Options(NamedTuple):
    """What the pipeline has to know, and the options of its steps."""

    folder: DatasetFolder
    check: bool
    modalities: tuple[str, ...]
    suffix: str          # the embedding that the next stage reads
    process: ProcessOptions
    images: ImageFetchOptions
    text: TextOptions
    image: ImageOptions
    fusion: FusionOptions


def parse_options(argv: list[str], description: str, suffix: str | None = None) -> Options:
    """The flags of a step, whose --suffix may have its own default. Raises ConfigError before anything is written."""
    args = parse(make_parser(description), argv)
    args.suffix = suffix if args.suffix is None else args.suffix
    return resolve_options(args)


def resolve_options(args: argparse.Namespace) -> Options:
    """Raises ConfigError for a value that cannot be, and for a flag that the others leave without a meaning."""
    for flag in (*RUN_FLAGS, *chain(*FLAGS.values())):
        if flag.is_valid and (value := getattr(args, flag.dest)) is not None:
            _check(flag.names, value, flag.is_valid(value), flag.expected)
    _refuse_useless(args)
    folder = DatasetFolder(args.data_root, args.dataset)
    process = _process(args, folder)
    modalities, suffix = _modalities(args)
    parts = tuple(args.fusion_parts.split(","))
    for part in parts:
        check_name("--fusion_parts", part)
    _check("--fusion_parts", args.fusion_parts, len(parts) > 1 and len(set(parts)) == len(parts)
           and not set(parts) & set(FUSIONS), "two different embeddings or more, such as td,image")
    weights = ((1.0,) * len(parts) if args.fusion_weights is None else
               _numbers("--fusion_weights", args.fusion_weights, len(parts)))
    _check("--fusion_weights", args.fusion_weights, min(weights) > 0, "weights above 0")
    made = parts if suffix in FUSIONS else (suffix,)
    text_suffix = next((part for part in made if modality_of(part) == "text"), "td")
    fusion_yaml = CONFIGS / "fusion.yaml"
    # The transform flags belong to the embedding that --suffix names.
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
    """`expected` is a sentence that begins with "it", or the description of a good value."""
    if not is_valid:
        raise ConfigError(flag, f"is {value}", expected if expected.startswith("it ") else f"wanted: {expected}",
                          "correct the value")


def _numbers(flag: str, text: str, count: int) -> tuple[float, ...]:
    with suppress(ValueError):
        found = tuple(map(float, text.split(",")))
        if len(found) == count and all(map(math.isfinite, found)):
            return found
    raise ConfigError(flag, f"is {text}", f"wanted: {count} numbers with commas between them", "correct the value")


def timestamp_of(date: str) -> int | None:
    """The second at which an ISO 8601 date begins, in UTC where it names no zone; None if it is no date."""
    with suppress(ValueError):
        found = datetime.fromisoformat(date)
        return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())
    return None


def _refuse_useless(args: argparse.Namespace) -> None:
    """Paths that are not there, an address that is none, and flags without the one that they belong to."""
    for flag, path, kind in (("--raw_dir", args.raw_dir, "folder"), ("--interactions", args.interactions, "file"),
                             ("--items", args.items, "file")):
        if path is not None and not (path.is_dir() if kind == "folder" else path.is_file()):
            raise ConfigError(f"{flag} {path}", f"is not a {kind}", fix="correct the path")
    if (target := args.export_recbole) is not None and target.exists() and not target.is_dir():
        raise ConfigError(f"--export_recbole {target}", "is not a folder", fix="name a folder")
    mirror = urlsplit(args.mirror or "")
    if args.mirror is not None and (mirror.scheme not in ("http", "https") or not mirror.hostname):
        # It is not repeated, for it may hold a password.
        raise ConfigError("--mirror", "is not an http or https address", fix="--mirror https://HOST/FOLDER")
    if args.adopt and not args.check:
        raise ConfigError("--adopt", "belongs to --check", "what is not sound is not adopted", "--check --adopt")
    if args.check and args.export_recbole is not None:
        raise ConfigError("--export_recbole", "has no meaning beside --check", "which writes nothing",
                          "leave one of the two out")
    if args.whiten and args.pca is None:
        raise ConfigError("--whiten", "needs the number of dimensions", fix="--pca N --whiten")


def _process(args: argparse.Namespace, folder: DatasetFolder) -> ProcessOptions:
    downloads, source = args.raw_dir is None and args.interactions is None, args.source or _find_source(args, folder)
    config = source_configs()[source]
    if downloads and args.dataset not in config["datasets"] and not folder.interactions.exists():
        raise _unknown("--dataset", args.dataset, f"{source} has no such data set", config["datasets"],
                       "correct the name or --source, or name the files: --raw_dir DIR", "its files are not named")
    # A folder a source: the years of a category share file names.
    raw = args.raw_dir or (args.interactions.parent if args.interactions else folder.path / "raw" / source)
    minima = [config[key] if getattr(args, key) is None else getattr(args, key)
              for key in ("min_user_interactions", "min_item_interactions")]
    processing = Processing(args.min_rating, args.duplicates, *minima, args.drop_items_without_text,
                            _template(args.template, config), args.split, *_split(args),
                            args.time_unit or config["time_unit"], args.bad_lines)
    unused = [flag.names for flag in FLAGS[OWN_FILES] if getattr(args, flag.dest) is not None]
    if unused and source != "local":
        raise ConfigError(unused[0], f"has no meaning for {args.dataset}, which is from {source}",
                          "it names a user's own files", "--source local, or leave it out")
    columns, item_columns = ({name: getattr(args, f"{name}_column") for name in names}
                             for names in (("user", "item", "time", "rating"), ITEM_FIELDS))
    item_columns = {"item": args.item_id_column or args.item_column, **item_columns}
    local = Local(args.interactions, args.items, columns, item_columns)
    return ProcessOptions(folder, source, config, raw, downloads, args.mirror, local, processing,
                          args.memory_limit, args.export_recbole, args.check, args.adopt, args.force)


def _unknown(flag: str, name: str, what: str, known: list[str], fix: str, nothing_known: str = "") -> ConfigError:
    close = closest(name, known)
    return ConfigError(f"{flag} {name}", what, nearest(name, known) if known else nothing_known,
                       f"{flag} {close}" if close else fix)


def _find_source(args: argparse.Namespace, folder: DatasetFolder) -> str:
    """From the raw files that are there, from what is processed, else from the data set's name."""
    configs, found = source_configs(), None
    if args.interactions is not None:
        found = "local"
    elif args.raw_dir is not None:
        # The first source of which the folder holds a file, and that file's first record is in the right format.
        found = next((name for name, config in configs.items() for pattern, lines in config["found_by"].items()
                      if re.fullmatch(config["found_names"], args.dataset)
                      for path in args.raw_dir.glob(pattern.format(dataset=args.dataset))
                      if lines == "any" or first_format(path) in (lines, "")), None)
    else:
        with suppress(OSError, ValueError, KeyError, TypeError):  # not there; or the next reader will say what is wrong
            found = json.loads(meta_path(folder.interactions).read_text(encoding="utf-8"))["settings"]["source"]
    if found not in configs:
        found = next((name for name, config in configs.items() if args.dataset in config["datasets"]), None)
    if found is None and args.raw_dir is not None:
        raise ConfigError(f"--raw_dir {args.raw_dir}", f"holds nothing that tells where {args.dataset} is from",
                          "looked for the files of Amazon, MovieLens and RecBole, and for interactions.*",
                          "name the --source, or the files with --interactions FILE --items FILE")
    if found is None and not folder.interactions.exists():
        names = sorted({d for config in configs.values() for d in config["datasets"]})
        raise _unknown("--dataset", args.dataset, "no source has such a data set", names,
                       "correct the name, or --raw_dir DIR for files of your own")
    return found or "local"  # tables that a user has put there: nothing records where they are from


def _split(args: argparse.Namespace) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """The ratios and the dates of a temporal split."""
    for flag, value in (("--split_ratios", args.split_ratios), ("--split_dates", args.split_dates)):
        if value is not None and args.split != "temporal":
            raise ConfigError(flag, "belongs to the temporal split", fix="--split temporal")
    if args.split_dates is not None and args.split_ratios is not None:
        raise ConfigError("--split_dates", "takes the place of --split_ratios", fix="leave one of the two out")
    ratios = DEFAULT_RATIOS if args.split_ratios is None else _numbers("--split_ratios", args.split_ratios, 3)
    _check("--split_ratios", args.split_ratios, min(ratios) > 0 and abs(sum(ratios) - 1) < 1e-6,
           "three shares above 0 that sum to 1")
    dates = () if args.split_dates is None else tuple(args.split_dates.split(","))
    moments = list(map(timestamp_of, dates))
    _check("--split_dates", args.split_dates,
           not dates or (len(dates) == 2 and None not in moments and moments[0] < moments[1]),
           "two dates, the earlier first, such as 2014-01-01,2014-03-01")
    return ratios, dates


def _template(name: str, config: dict) -> tuple[str, ...]:
    """The pieces that a template's name stands for, or those that are spelt out."""
    where, templates = f"--template {name}", config["templates"]
    if name in templates:
        return tuple(templates[name])
    if "{" not in name:
        raise _unknown("--template", name, "no such template", list(templates),
                       "a template of the source's YAML, or pieces like '{title} | by {brand}'")
    known = [field for field in config["items"]["columns"] if field not in ("item", "image")]
    pieces = tuple(piece.strip() for piece in name.split("|"))
    for piece in pieces:
        try:
            parsed = [part for part in Formatter().parse(piece) if part[1] is not None]
        except ValueError as error:
            raise ConfigError(where, f"{piece!r} is no piece", str(error), "'{title} | by {brand}'") from error
        wrong = [field for _words, field, style, conversion in parsed if field not in known or conversion or style]
        if wrong or not parsed:
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


def modality_of(suffix: str) -> str | None:  # a text embedding may have any name that nothing else has
    return {"image": "image", "cf": None, **dict.fromkeys(FUSIONS)}.get(suffix, "text")


def load_section(path: Path, name: str, record: type):
    """A section of fusion.yaml as a record, read strictly: no key unknown, missing, or of another kind."""
    config, origins = load_yaml(path)
    values, kinds = config.get(name), get_type_hints(record)
    if not isinstance(values, dict):
        raise ConfigError(path, f"has no section {name!r}", nearest(name, list(config)), f"add `{name}:` and its keys")
    bounds = {key: BOUNDS.get(key, (1, None)) for key, kind in kinds.items() if kind is not str}
    check_section(values, {key: kind() for key, kind in kinds.items()}, name, origins,
                  Rules(bounds, CHOICES, set(), set(), None))
    if lacking := [key for key in kinds if key not in values]:
        raise ConfigError(path, f"{name} lacks {lacking[0]}", fix=f"add {lacking[0]}: <value>")
    return record(**values)

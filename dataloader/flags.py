"""Command-line flags shared by all steps of the data stage, and source.yaml, which stores the flags of a dataset."""

import argparse
import math
import re
import reprlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import yaml

from common.artifacts import FUSIONS, DatasetFolder
from common.cli import Parser, add_force_flag, add_shared_flags
from common.config import load_yaml
from common.errors import ConfigError, closest, nearest
from common.publishing import write_text

CONFIGS = Path(__file__).resolve().parent / "configs"
MODALITIES = ("text", "image")
DEFAULT_PARTS = "td,image"
DEFAULT_RATIOS = (0.8, 0.1, 0.1)
MEMORY_LIMIT = "2GB"
ITEM_FIELDS = ("title", "description", "brand", "price", "categories", "features", "image")


class Flag(NamedTuple):
    """A command-line flag."""

    names: str                        # separated by spaces
    help: str
    takes: str | tuple | Callable | None = None  # a metavar (see TYPES), the choices, or bool (takes no value)
    default: object = None
    is_valid: Callable | None = None  # checks the value; not called for None
    expected: str = ""                # the valid values, for the error "must be <expected>, got <value>"

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


SOURCE_KEYS = ("order", "found_by", "found_names", "datasets", "files", "wheels", "items", "time_unit", "templates",
               "min_user_interactions", "min_item_interactions", "rating_range", "expected")


@cache
def source_configs() -> dict[str, dict]:
    """Return the YAML of each source, sorted by the key `order`: name of the source -> content."""
    known = {path.stem: load_yaml(path)[0] for path in CONFIGS.glob("*.yaml")}
    sources = []
    for name, config in known.items():
        if "reader" in config:
            if missing := [key for key in SOURCE_KEYS if key not in config]:
                raise ConfigError(CONFIGS / f"{name}.yaml", f"has no key {missing[0]!r}",
                                  f"Every source needs these keys: {', '.join(SOURCE_KEYS)}", f"add {missing[0]}")
            sources.append((config["order"], name))
    return {name: known[name] for _order, name in sorted(sources)}


def is_date_form(form: str) -> bool:
    """Return whether DuckDB can read dates in this form, which has the codes of strptime."""
    import duckdb  # slow to import, and rarely needed here

    with duckdb.connect() as connection, suppress(duckdb.InvalidInputException):
        connection.execute("SELECT try_strptime('', ?)", [form])
        return "%" in form
    return False


ABOVE_0, FROM_0 = (lambda n: n > 0, "above 0"), (lambda n: n >= 0, "at least 0")
OWN_FILES = "your own files (--source local)"
FLAGS = {
    "source of the data": [
        Flag("--source", "the source of the dataset (default: the source of the files in --raw_dir or of the existing "
             "tables, else the first source that has the dataset)", source_configs),
        Flag("--raw_dir", "the folder with the raw files; nothing is downloaded", "DIR"),
        Flag("--source_config", "a YAML file with values for the flags in this group and the next two groups; flags on "
             "the command line override them; none: use no file (default: data/<D>/source.yaml, if it exists)", "F"),
        Flag("--mirror", "a mirror of the files; each file is first requested from URL/<file name>", "URL")],
    OWN_FILES: [
        *(Flag(f"--{name}", f"the file with the {name}: CSV, TSV, JSON lines or Parquet (default: {name}.* or the "
               f"RecBole file in {place})", "FILE") for name, place in
          (("interactions", "--raw_dir"), ("items", "--raw_dir, or in the folder of --interactions"))),
        *(Flag(f"--{column}_column", f"the {column} column of the interactions (default: {default})", "C")
          for column, default in (("user", "user_id"), ("item", "item_id"), ("time", "timestamp"),
                                  ("rating", "rating, if it exists; '': do not read ratings"))),
        Flag("--item_id_column", "the item id column of the items (default: the value of --item_column)", "C"),
        *(Flag(f"--{field}_column", f"the {field} column of the items (default: {field}, if it exists; '': none)", "C")
          for field in ITEM_FIELDS),
        Flag("--no_header", "the CSV or TSV files whose first line does not contain the column names; their columns "
             "have numbers from 1, as in --user_column 1", ("interactions", "items", "both")),
        *(Flag(name, help, "S", None, re.compile(r"""[^"\\\r\n\0]{1,4}|\\t|space""").fullmatch,
               "one to four characters without quotes and backslashes, or the word tab or space")
          for name, help in (
              ("--separator", "the characters between the columns of CSV and TSV files, or the word tab or space "
               "(default for each file: commas or tabs, as its extension says, or what its first lines contain "
               "instead)"),
              ("--items_separator", "the same for the items only, if the two files have different separators (default: "
               "the value of --separator)"))),
        Flag("--quoting", "the quotes in CSV and TSV files. none: a quote is a part of the text; double: a quote at "
             "the start of a field opens a quoted value (default: double for commas and semicolons; for other "
             "separators, a quote is a part of the text unless quotes enclose the whole field)", ("none", "double")),
        Flag("--escape", "the character before a quote within a quoted value, such as \\ in files of Spark (default: "
             "such quotes are doubled)", "C", None, re.compile(r'(?=[!-~])[^\w"]').fullmatch,
             "one character that is not a letter, a digit, a blank or a quote")],
    "processing": [
        Flag("--time_unit", "the unit of the raw timestamps since 1970; date means ISO 8601 or digits such as 20140228 "
             "(default: from the source's YAML)", ("s", "ms", "us", "ns", "day", "date")),
        Flag("--time_format", "the form of the raw dates, in the codes of strptime, such as '%%d/%%m/%%Y %%H:%%M'; "
             "instead of --time_unit", "F", None, is_date_form, "codes of strptime, such as '%d/%m/%Y %H:%M'"),
        Flag("--bad_lines", "fail: an invalid line is an error; skip: skip invalid lines, at most 1 %% of all lines, "
             "and list them in a file; skip:5%%: the same with another limit", "P", "fail",
             re.compile(r"fail|skip(:(?!0+(\.0+)?%)\d{1,2}(\.\d+)?%)?").fullmatch,
             "fail, skip, or skip with a limit between 0% and 100%, such as skip:5%"),
        Flag("--min_rating", "drop events with a lower rating", "R", None, math.isfinite, "finite"),
        Flag("--duplicates", "keep: keep all events; exact: keep one event per user, item and time; user_item: keep "
             "each user's first event with an item", ("keep", "exact", "user_item"), "keep"),
        *(Flag(f"--min_{side}_interactions", f"k-core filter: the minimum number of events per {side}; 0 means no "
               "minimum (default: from the source's YAML, 5)", "N", None, *FROM_0) for side in ("user", "item")),
        Flag("--template", "the text of an item: the name of a template in the source's YAML, or pieces such as "
             "'{title} | by {brand}'; a piece with an empty field is left out", "T", "td"),
        Flag("--missing_values", "the texts that mean a missing value in the fields of items, separated by commas "
             "(default: \\N,nan,NaN,<NA>, and None, null and NULL if at least two records have them; '': none)", "V"),
        Flag("--drop_items_without_text", "drop items without text (default: keep them and use their raw ids as text)",
             bool),
        Flag("--split", "leave_one_out: each user's last event is test, and the event before it is valid; temporal: "
             "valid and test begin at the same time for all users", ("leave_one_out", "temporal"), "leave_one_out"),
        Flag("--split_ratios", "temporal split: the shares of train, valid and test (default: "
             f"{','.join(map(str, DEFAULT_RATIOS))})", "A,B,C"),
        Flag("--split_dates", "temporal split: the start of valid and the start of test (ISO 8601, UTC), instead of "
             "--split_ratios", "D1,D2"),
        Flag("--memory_limit", "the memory limit of DuckDB; larger data is spilled to disk", "M", MEMORY_LIMIT,
             re.compile(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]i?B", re.IGNORECASE).fullmatch, "a size such as 2GB"),
        Flag("--check", "only check the dataset's files, and print a report on the raw files that flags name; write "
             "nothing", bool),
        Flag("--adopt", "with --check: write the missing meta files for valid files that you made yourself; the "
             "other stages need a meta file for every file", bool),
        Flag("--export_recbole", "also write RecBole's atomic files to this folder", "DIR")],
    "embeddings": [
        Flag("--modalities", "text, image or text,image (default: the modalities that --suffix needs, or text if "
             "--suffix is not given)", "M"),
        Flag("--suffix --embedding_suffix", "the embedding that the next stage reads: image, cf, "
             f"{', '.join(FUSIONS)}, or any other name for a text embedding (default: td; with --modalities "
             "text,image: fused-concat)", "S"),
        Flag("--text_model", "a sentence-transformers model by name or path, tfidf (needs no model), or api:<name>",
             "M", "all-MiniLM-L6-v2"),
        Flag("--api_url", "an OpenAI-compatible endpoint (default: $OPENAI_BASE_URL, else OpenAI's); the key is read "
             "from $OPENAI_API_KEY", "URL"),
        Flag("--api_rate", "the number of API requests per second, of all processes together", "R", 5.0, *ABOVE_0),
        Flag("--pca", "reduce the embedding to this number of dimensions", "N", None, *ABOVE_0),
        Flag("--whiten", "with --pca: scale each dimension to variance 1", bool),
        Flag("--zscore", "scale each dimension to mean 0 and standard deviation 1", bool),
        Flag("--l2", "scale each vector to length 1", bool),
        Flag("--image_model", "a CLIP model, by name or path", "M", "clip-ViT-B-32"),
        Flag("--image_rate", "the number of image requests per second", "R", 20.0, *ABOVE_0),
        Flag("--min_image_side", "the minimum width and height in pixels; smaller images are placeholders, which "
             "count as missing", "N", 10, *ABOVE_0),
        Flag("--missing_images", "mask: items without an image get the mean vector and are marked in the mask file; "
             "error: stop with an error", ("mask", "error"), "mask"),
        Flag("--fusion_parts", f"the suffixes of the embeddings to fuse (default: {DEFAULT_PARTS})", "S,S"),
        Flag("--fusion_weights", "one weight per part (default: all 1)", "W,W"),
        Flag("--fusion_dim", "the number of dimensions of fused-pca and fused-align", "N", 128, *ABOVE_0)]}
RUN_FLAGS = [
    Flag("--device", "the device on which models run", None, "auto", re.compile(r"auto|cpu|mps|cuda(:\d+)?").fullmatch,
         "auto, cpu, cuda or cuda:<n>"),
    Flag("--seed", "the random seed", "N", 0, lambda n: 0 <= n < 2**31, f"from 0 to {2**31 - 1}")]


def make_parser(description: str) -> Parser:
    parser = Parser(description=description, prog="dataloader")
    add_shared_flags(parser)
    add_data_flags(parser)
    for flag in RUN_FLAGS:
        flag.add_to(parser)
    return parser


def add_data_flags(parser: Parser) -> None:
    """Add the flags of all data steps to the parser. run_pipeline.py has these flags too."""
    add_force_flag(parser)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            flag.add_to(group)


# The flags that are stored in source.yaml: they describe the raw files, and how the tables are made from these files.
# `--mirror` is not stored, because it may contain a password.
REMEMBERED = {flag.dest: flag for flag in chain(FLAGS["source of the data"], FLAGS[OWN_FILES], FLAGS["processing"])
              if flag.dest not in ("mirror", "source_config", "memory_limit", "check", "adopt", "export_recbole")}
# If a flag in the keys is on the command line, the flags in the value of this key are not taken from source.yaml.
REPLACES = {"raw_dir": ("source", "interactions", "items"), "interactions": ("source", "raw_dir"),
            "time_unit": ("time_format",), "time_format": ("time_unit",),
            "split": ("split_ratios", "split_dates"), "split_ratios": ("split_dates",),
            "split_dates": ("split_ratios",)}
IGNORE = "none"  # the value of --source_config that ignores source.yaml
HEADER = """# The flags of this dataset, written by step 2. Later commands use these flags. Flags on the command line
# override them.
# --source_config none ignores this file.
"""


def fill_flags(args: argparse.Namespace, argv: list[str]) -> str:
    """Set flags that are not on the command line to the values in --source_config or in `data/<D>/source.yaml`.

    Returns a line for the log that lists the flags that were set, or "" if none were set. Raises ConfigError for an
    unknown key or a wrong value in the file.
    """
    remembered = DatasetFolder(args.data_root, args.dataset).source_flags
    path = remembered if args.source_config is None else Path(args.source_config)
    if args.source_config == IGNORE or (path == remembered and not path.exists()):
        return ""
    values, origins = load_yaml(path)
    given = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    if args.source not in (None, values.get("source")):
        return ""  # the command line names another source
    skipped = given.union(*(REPLACES.get(name, ()) for name in given))
    filled = {}
    for name, value in values.items():
        if name not in REMEMBERED:
            raise ConfigError(origins[name], f"unknown key {name!r}", nearest(name, list(REMEMBERED)),
                              f"write {closest(name, list(REMEMBERED)) or 'the name of a flag without its dashes'}")
        checked = _typed(REMEMBERED[name], value, origins[name], path.parent)
        # A remembered path is not used if its file was deleted after the tables were made. --check does not use it
        # either, because --check reads only the raw files on the command line.
        unused = path == remembered and isinstance(checked, Path) and (args.check or not checked.exists())
        if name not in skipped and checked is not None and not unused:
            filled[name] = checked
    vars(args).update(filled)
    args.source_config, args.filled_flags = IGNORE, set(filled)
    return f"flags from {path}: " + " ".join(f"--{name}={value}" for name, value in filled.items()) if filled else ""


def _typed(flag: Flag, value: object, where: str, folder: Path) -> object:
    """Convert a value from a YAML file to the type that the flag has on the command line.

    Relative paths start from `folder`. Raises ConfigError if the value is not valid for the flag.
    """
    if value is None or (flag.takes is bool and isinstance(value, bool)):
        return value
    if flag.takes is bool or isinstance(value, dict | list | bool):
        raise ConfigError(where, f"{flag.dest} must be {'true or false' if flag.takes is bool else 'a single value'}, "
                          f"got {value!r}", fix="correct the value")
    if flag.takes is None or isinstance(flag.takes, str):
        try:
            typed = TYPES.get(flag.takes, str)(value)
        except (ValueError, OverflowError, TypeError) as error:
            what = "a path (put it in quotes)" if TYPES[flag.takes] is Path else "a number"
            raise ConfigError(where, f"{flag.dest} must be {what}, got {reprlib.repr(value)}",
                              fix="correct the value") from error
        return folder.absolute() / typed if isinstance(typed, Path) else typed
    choices = list(flag.takes() if callable(flag.takes) else flag.takes)
    if value not in choices:
        raise ConfigError(where, f"unknown {flag.dest} {value!r}", nearest(str(value), choices),
                          f"use one of {', '.join(choices)}")
    return value


def remembered_flags(args: argparse.Namespace, source: str) -> dict[str, object]:
    """Return the flags to store in `source.yaml`: the source, and the flags whose values differ from their defaults.

    Paths are made absolute.
    """
    values = {name: value for name, flag in REMEMBERED.items()
              if (value := getattr(args, name)) is not None and value is not False and value != flag.default}
    paths = {name: str(value.absolute()) for name, value in values.items() if isinstance(value, Path)}
    return {"source": source} | values | paths


def remember_flags(path: Path, values: dict[str, object]) -> None:
    """Write the flags to the file `path` (`source.yaml`), unless the file already has this content."""
    text = HEADER + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)

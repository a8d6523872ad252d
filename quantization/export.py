"""Export of semantic IDs for other systems: three JSON files in the format of LC-Rec, and a CSV table with titles."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from common.artifacts import DatasetFolder, load_codes, load_interactions, load_items, load_meta, load_users
from common.errors import ConfigError
from common.publishing import write_text
from common.targets import check_targets

# N items, L levels

NAMES = ("index.json", "item.json", "inter.json", "ids.csv")
HEADER = re.compile(r"raw_id(,code_\d+)+,semantic_id,title")


def export(folder: DatasetFolder, quantizer: str, suffix: str, tag: str | None, target: Path) -> list[Path]:
    """Write the semantic IDs, items and user sequences to four files in the folder `target`. Return their paths.

    <D> is the name of the dataset. Items and users are given by their raw ids. LC-Rec, LETTER and MiniOneRec read the
    JSON files.

    <D>.index.json: item -> tokens of its semantic ID
    <D>.item.json: item -> {"title": ..., "description": the item's text}
    <D>.inter.json: user -> items, oldest first; the last item is for the test, the item before it for validation
    <D>.ids.csv: raw id, codes, semantic ID and title of every item

    Raises ConfigError if the split is not leave-one-out, because `inter.json` cannot represent other splits. Raises
    ConfigError if one of the files exists and is not from an earlier export.
    """
    *others, first = (f"{folder.name}.{name}" for name in NAMES)
    check_targets("--export", target, (folder.data_root,), first, others, HEADER.fullmatch)
    _require_leave_one_out(folder)
    codes, _ = load_codes(folder, quantizer, suffix, tag, distinct=False)
    items = load_items(folder)
    rows = tokens(codes)
    texts = ({"title": title, "description": text} for title, text in zip(items["title"], items["text"], strict=True))
    contents = {  # ids.csv is the first file, because `check_targets` looks for it
        "ids.csv": _table(items["raw_id"], codes, rows, items["title"]),
        "index.json": _json_object(zip(items["raw_id"], rows, strict=True)),
        "item.json": _json_object(zip(items["raw_id"], texts, strict=True)),
        "inter.json": _json_object(_sequences(folder, items["raw_id"]))}
    for name, content in contents.items():
        write_text(target / f"{folder.name}.{name}", content)
    return [target / f"{folder.name}.{name}" for name in NAMES]


def _require_leave_one_out(folder: DatasetFolder) -> None:
    split = load_meta(folder.interactions, folder.make_command).get("split_name", "leave_one_out")
    if split != "leave_one_out":
        raise ConfigError("--export", f"the dataset {folder.name} has a {split} split", "Programs that read the "
                          "exported files always use the last two items of each user for validation and test",
                          f"bash dataloader/2_process.sh --dataset {folder.name}{folder.root_flag} "
                          "--split leave_one_out")


def _json_object(entries: Iterable[tuple[str, object]]) -> str:
    """Return a JSON object with one line per entry."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries)
    return "{" + ",\n".join(lines) + "}\n"


def _sequences(folder: DatasetFolder, raw_item: np.ndarray) -> Iterator[tuple[str, list[str]]]:
    """For each user, yield the raw id and the raw ids of the user's items, oldest first."""
    events, raw_user = load_interactions(folder), load_users(folder)["raw_id"]
    ends = np.searchsorted(events.user, np.arange(1, len(raw_user)))
    for user, item in zip(raw_user, np.split(raw_item[events.item], ends), strict=True):
        yield user, item.tolist()


def _table(raw_ids: np.ndarray, codes: np.ndarray, rows: list[list[str]], titles: np.ndarray) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["raw_id", *(f"code_{level + 1}" for level in range(codes.shape[1])), "semantic_id", "title"])
    writer.writerows([raw_id, *code, "".join(row), title]
                     for raw_id, code, row, title in zip(raw_ids, codes.tolist(), rows, titles, strict=True))
    return buffer.getvalue()


def tokens(codes: np.ndarray) -> list[list[str]]:
    """Return the tokens of every item: (N, L) -> N lists such as `["<a_12>", "<b_3>"]`."""
    return [[token(level, code) for level, code in enumerate(row)] for row in codes.tolist()]


def token(level: int, code: int) -> str:
    """Return the token of a code, such as `<a_12>` for code 12 of the first level."""
    return f"<{letter(level)}_{code}>"


def letter(level: int) -> str:
    """Return the name of a level in a token. The names are a, b, ..., z, aa, ab, ..."""
    return (letter(level // 26 - 1) if level >= 26 else "") + chr(ord("a") + level % 26)

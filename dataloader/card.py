"""The data card of a dataset, `data/<D>/card.md`: numbers from the meta file of the interactions."""

from itertools import pairwise

from common.artifacts import DatasetFolder, counts, load_meta
from common.publishing import write_text
from common.tables import markdown, percent
from dataloader.tables.statistics import days_of

HEADER = "This file shows numbers from `interactions.parquet.meta.json`. Step 2 renews it together with the tables."


def write_card(folder: DatasetFolder) -> bool:
    """Write the card of a dataset, unless it already has this content. Return whether it was written."""
    text = card(folder.name, load_meta(folder.interactions, folder.make_command))
    if folder.card.exists() and folder.card.read_text(encoding="utf-8", errors="replace") == text:
        return False
    write_text(folder.card, text)
    return True


def card(name: str, meta: dict) -> str:
    """Return the card as Markdown. `meta` is the meta file of the interactions.

    A line whose numbers are not in the meta file is left out, because an earlier version may have written this file.
    """
    parts = [f"# Data card of {name}", HEADER, f"{counts(meta)}.", *_files(meta), *_filters(meta), *_time(meta),
             *_splits(meta), *_sizes(meta), *_items(meta)]
    return "\n\n".join(parts) + "\n"


def _files(meta: dict) -> list[str]:
    if "raw" not in meta:
        return []
    rows = [[role, _cell(raw["file"]), f"{raw['size']:,}", raw["sha256"]] for role, raw in meta["raw"].items()]
    return ["## Raw files", markdown(["content", "file", "bytes", "sha256"], rows), f"Command: `{meta['command']}`"]


def _filters(meta: dict) -> list[str]:
    if "filters" not in meta:
        return []
    first, *others = meta["filters"]
    left = [step["interactions"] for step in meta["filters"]]
    rows = [[f"events {first['step']}", "", f"{left[0]:,}"],
            *([_cell(step["step"]), f"{before - after:,}", f"{after:,}"]
              for step, (before, after) in zip(others, pairwise(left), strict=True))]
    skipped = [f"Skipped before these steps: {meta['num_bad_lines']:,} invalid lines."] * bool(
        meta.get("num_bad_lines"))
    return ["## Filters", markdown(["step", "events removed", "events left"], rows), *skipped]


def _time(meta: dict) -> list[str]:
    statistics, text = meta.get("statistics", {}), []
    if {"first_timestamp", "last_timestamp"} <= statistics.keys():
        text.append(f"{days_of(statistics['first_timestamp'], statistics['last_timestamp'])} (UTC).")
    if "num_equal_times" in statistics:
        share = statistics["num_equal_times"] / statistics["num_interactions"]
        text.append(f"{percent(share)} of the events have the same time as the previous event of their user; the order "
                    "of such events is the order of the lines.")
    if meta.get("num_events_before_1990"):
        text.append(f"{meta['num_events_before_1990']:,} of the events read are before 1990.")
    if "num_exact_duplicates" in statistics:
        text.append(f"{statistics['num_exact_duplicates']:,} events are exact duplicates (same user, item and time).")
    return ["## Time", "\n".join(text)] if text else []


def _splits(meta: dict) -> list[str]:
    if "num_in_split" not in meta:
        return []
    nums, repeats, cold = (meta.get(key, {}) for key in ("num_in_split", "num_repeats", "num_cold_items"))
    columns = {"split": [*nums], "events": [f"{num:,}" for num in nums.values()],
               "share": [percent(num / meta["num_interactions"]) for num in nums.values()]}
    notes = []
    if repeats:
        columns["repeats"] = [percent(repeats[name] / num) if num and name in repeats else ""
                              for name, num in nums.items()]
        notes.append("repeats: the share of the events whose item is already in the history of their user.")
    if cold:
        columns["cold items"] = [f"{cold[name]:,}" if name in cold else "" for name in nums]
        notes.append("cold items: the number of items of these events that have no event in train.")
    table = markdown([*columns], [*zip(*columns.values(), strict=True)])
    return [f"## Splits ({meta['split_name']})", table, *notes]


def _sizes(meta: dict) -> list[str]:
    sides = {side: meta.get("statistics", {}).get(f"events_of_{side}") for side in ("a_user", "an_item")}
    if None in sides.values():
        return []
    rows = [[side.replace("_", " "), *(f"{value:g}" for value in values.values())] for side, values in sides.items()]
    density = f"Density (interactions / (users x items)): {meta['statistics']['density']:.4%}"
    return ["## Events of a user and of an item", markdown(["", *sides["a_user"]], rows), density]


def _items(meta: dict) -> list[str]:
    named = {"num_without_text": "items without text (their raw ids are used as text)",
             "num_without_record": "items without a record in the items file",
             "num_texts_cut": "texts that were cut, because they are too long",
             "num_contradicting_items": "items with records that contradict each other",
             "num_records": "records in the items file", "num_duplicate_records": "further records of the same item",
             "num_unused_records": "records of items without interactions",
             "num_raw_items": "items before the filters",
             "num_raw_items_with_record": "items before the filters that have a record"}
    rows = [[what, f"{meta[key]:,}"] for key, what in named.items() if key in meta]
    return ["## Items", markdown(["what", "number"], rows)] if rows else []


def _cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")

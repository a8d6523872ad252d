"""Requests for recommendations: read them from a file, and convert raw ids of items to item indices."""

import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.artifacts import DatasetFolder, load_items, load_users
from common.errors import DataError, nearest, nearest_id
from common.reading import parse_json, require_regular, shortened
from recommendation.dataset import Sequences
from recommendation.unknown_users import unknown_user

# H histories, E total number of items in all histories

KEYS = ("user", "history")
FIX = 'write lines like ["id", "id"], {"user": "id", "history": ["id", "id"]} or {"user": "id"}, with all ids in quotes'


class Query(NamedTuple):
    """A request for recommendations, with a user of the dataset or with a history."""

    user: str | None           # raw id of a user in the dataset; with a history: any name, shown in the output
    history: list[str] | None  # raw ids of items, oldest first; None: use the user's events in the dataset
    where: str = ""            # where the query comes from (flag or file:line), for error messages


class Histories(NamedTuple):
    """The histories of several queries, as item indices."""

    users: list[str | None]    # H entries: the user of each query
    items: np.ndarray          # (E,) int64, one history after another, oldest item first
    offsets: np.ndarray        # (H + 1,) history i is items[offsets[i]:offsets[i + 1]]
    unknown: list[list[str]]   # H entries: the skipped raw ids of each history (unknown items)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


class Lookup:
    """Convert raw ids of items to item indices, and find the events of a user."""

    def __init__(self, folder: DatasetFolder, sequences: Sequences):
        self.folder, self.sequences = folder, sequences
        items = load_items(folder)
        self.raw_ids, self.titles = items["raw_id"], items["title"]
        self.item_of = {raw_id: item for item, raw_id in enumerate(self.raw_ids)}
        self._user_of: dict[str, int] | None = None

    def histories(self, queries: Iterable[Query]) -> Histories:
        """Return the histories of the queries as item indices. Unknown items are skipped.

        Raises DataError if a query without a history names an unknown user.
        """
        users, rows, unknown = [], [], []
        for query in queries:
            users.append(query.user)
            known = (self._events(str(query.user), query.where) if query.history is None else
                     [self.item_of[raw_id] for raw_id in query.history if raw_id in self.item_of])
            rows.append(np.asarray(known, dtype=np.int64))
            unknown.append([raw_id for raw_id in query.history or [] if raw_id not in self.item_of])
        items = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        return Histories(users, items, np.cumsum([0, *map(len, rows)]), unknown)

    def split_at_commas(self, words: list[str]) -> list[str]:
        """Split the words of --history at their commas, and return the raw ids.

        A word is not split if it is a known item, or if none of its parts is a known item.
        """
        result = []
        for word in words:
            parts = [part.strip() for part in word.split(",") if part.strip()]
            whole = word in self.item_of or not any(part in self.item_of for part in parts)
            result += [word] if whole else parts
        return result

    def _events(self, raw_user: str, where: str) -> np.ndarray:
        """Return the items of all events of a user, including validation and test events."""
        if self._user_of is None:
            self._user_of = {raw_id: user for user, raw_id in enumerate(load_users(self.folder)["raw_id"])}
        if raw_user not in self._user_of:
            raise unknown_user(self.folder, raw_user, nearest_id(raw_user, self._user_of), where)
        user = self._user_of[raw_user]
        start, end = np.searchsorted(self.sequences.user, [user, user + 1])
        return self.sequences.item[start:end]


def read_histories(path: Path) -> list[Query]:
    """Read queries from a JSON Lines file, one query per line.

    A line is a list of raw item ids, `{"user": ..., "history": [...]}`, or `{"user": ...}`. The last form selects all
    events of the user in the dataset. Raises DataError if a line has another form, or if the file is empty or cannot be
    read.
    """
    try:
        require_regular(path)
        with path.open(encoding="utf-8-sig") as file:
            queries = [_parse_query(line, f"{path}:{number}") for number, line in enumerate(file, start=1)
                       if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, "cannot be read", str(error), "use a JSON Lines file in UTF-8") from error
    if not queries:
        raise DataError(path, "has no histories", "The file is empty", FIX)
    return queries


def _parse_query(line: str, where: str) -> Query:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataError(where, "is not valid JSON", shortened(str(error)), FIX) from error
    value = {"history": value} if isinstance(value, list) else value
    if not isinstance(value, dict) or not value:
        raise DataError(where, "must be a JSON list, or a JSON object with the key user or history", fix=FIX)
    for key in value:
        if key not in KEYS:
            raise DataError(where, f"unknown key {reprlib.repr(key)}", nearest(key, list(KEYS)), FIX)
    user, history = value.get("user"), value.get("history")
    if not (user is None or isinstance(user, str)) or (user is None and history is None):
        raise DataError(where, f"the user must be a string, got {reprlib.repr(user)}", "Raw ids must be strings", FIX)
    if history is not None and not (isinstance(history, list) and all(isinstance(raw_id, str) for raw_id in history)):
        raise DataError(where, "the history must be a list of strings", "Raw ids must be strings, even if they look "
                        "like numbers", FIX)
    return Query(user, history, where)

"""Histories in raw ids, from the command line, a file or the data set, as items."""

import json
import shlex
from bisect import bisect
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.artifacts import DatasetFolder, load_items, load_users
from common.errors import DataError, closest, nearest
from recommendation.dataset import Sequences

# H histories, E items of all of them, N items of the catalogue

NUM_NEIGHBOURS = 500  # ids before and behind an unknown one, among which the nearest is looked for
KEYS = ("user", "history")
FIX = 'lines like ["id", "id"], {"user": "id", "history": ["id", "id"]} or {"user": "id"}, the ids in quotes'


class Query(NamedTuple):
    """One question: whose next items, and after which."""

    user: str | None           # raw id; with a history a name that comes back, without one a user of the data set
    history: list[str] | None  # raw ids, oldest first
    where: str = ""            # for errors


class Histories(NamedTuple):
    """What is asked, in items."""

    users: list[str | None]    # H raw ids
    items: np.ndarray          # (E,) int64, one history after another, oldest first
    offsets: np.ndarray        # (H + 1,) where each begins and ends
    unknown: list[list[str]]   # H lists of raw ids that are no items, and were left out

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


class Lookup:
    """From raw ids to items, and from users to all of their events."""

    def __init__(self, folder: DatasetFolder, sequences: Sequences):
        self.folder, self.sequences = folder, sequences
        items = load_items(folder)
        self.raw_ids, self.titles = items["raw_id"], items["title"]
        self.item_of = {raw_id: item for item, raw_id in enumerate(self.raw_ids)}
        self._user_of: dict[str, int] | None = None

    def histories(self, queries: Iterable[Query]) -> Histories:
        """Raises DataError for a user that is not there; unknown items are left out and listed."""
        users, rows, unknown = [], [], []
        for one in queries:
            users.append(one.user)
            known = (self._events(str(one.user), one.where) if one.history is None else
                     [self.item_of[raw_id] for raw_id in one.history if raw_id in self.item_of])
            rows.append(np.asarray(known, dtype=np.int64))
            unknown.append([raw_id for raw_id in one.history or [] if raw_id not in self.item_of])
        items = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        return Histories(users, items, np.cumsum([0, *map(len, rows)]), unknown)

    def split_at_commas(self, words: list[str]) -> list[str]:
        """Each word that is an item stays whole; another one is split at its commas if a part of it is an item."""
        result = []
        for word in words:
            parts = [part.strip() for part in word.split(",") if part.strip()]
            whole = word in self.item_of or not any(part in self.item_of for part in parts)
            result += [word] if whole else parts
        return result

    def _events(self, raw_user: str, where: str) -> np.ndarray:
        """All of a user's items, those of the valid and test events included."""
        if self._user_of is None:
            self._user_of = {raw_id: user for user, raw_id in enumerate(load_users(self.folder)["raw_id"])}
        if raw_user not in self._user_of:
            why, close = nearest_id(raw_user, self._user_of)
            fix = f"a raw id of {self.folder.users}, or a --history of items"
            if close is not None:
                fix = f"--user={shlex.quote(close)}" if where == "--user" else json.dumps({"user": close})
            raise DataError(where, f"{self.folder.name} has no user {raw_user!r}", why, fix)
        user = self._user_of[raw_user]
        start, end = np.searchsorted(self.sequences.user, [user, user + 1])
        return self.sequences.item[start:end]


def nearest_id(raw_id: str, known: Iterable[str]) -> tuple[str, str | None]:
    """`did you mean 'x'?` and x, found among the ids that sort next to `raw_id`; or the number of ids, and None."""
    ordered = sorted(known, key=str.casefold)
    place = bisect(ordered, raw_id.casefold(), key=str.casefold)
    close = closest(raw_id, ordered[max(place - NUM_NEIGHBOURS, 0):place + NUM_NEIGHBOURS])
    if close is not None:
        return f"did you mean {close!r}?", close
    return (f"there are {len(ordered)}, from {ordered[0]!r} to {ordered[-1]!r}" if ordered else "there are none"), None


def read_histories(path: Path) -> list[Query]:
    """JSON lines: a list of raw ids, `{"user": ..., "history": [...]}`, or `{"user": ...}` for a user's own events.

    Raises DataError naming the line that is none of these, and where there is no line at all.
    """
    try:
        with path.open(encoding="utf-8") as file:
            queries = [_parsed(line, f"{path}:{number}") for number, line in enumerate(file, start=1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, "cannot be read", str(error), "name a file of JSON lines in UTF-8") from error
    if not queries:
        raise DataError(path, "has no history", "it is empty", FIX)
    return queries


def _parsed(line: str, where: str) -> Query:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(where, "is not JSON", str(error), FIX) from error
    value = {"history": value} if isinstance(value, list) else value
    if not isinstance(value, dict) or not value:
        raise DataError(where, "is neither a list of raw ids nor an object with a user or a history", fix=FIX)
    for key in value:
        if key not in KEYS:
            raise DataError(where, f"unknown key {key!r}", nearest(key, list(KEYS)), FIX)
    user, history = value.get("user"), value.get("history")
    if not (user is None or isinstance(user, str)) or (user is None and history is None):
        raise DataError(where, f"the user is {user!r}", "a raw id is text", FIX)
    if history is not None and not (isinstance(history, list) and all(isinstance(raw_id, str) for raw_id in history)):
        raise DataError(where, "the history is not a list of texts", "a raw id is text, also where it looks like a "
                        "number", FIX)
    return Query(user, history, where)

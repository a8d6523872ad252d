"""Values of flags: those that cannot be raise ConfigError naming flag, value and rule."""

import math
from datetime import UTC, datetime

from common.errors import ConfigError


def checked(flag: str, value, good: object, wanted: str):
    """`wanted` is a sentence that begins with "it", or the description of a good value."""
    if not good:
        raise ConfigError(flag, f"is {value}", wanted if wanted.startswith("it ") else f"wanted: {wanted}",
                          "correct the value")
    return value


def above_zero(flag: str, value):
    return checked(flag, value, value > 0, "it must be above 0")


def at_least_zero(flag: str, value):
    return checked(flag, value, value >= 0, "it must be at least 0")


def finite(flag: str, value: float) -> float:
    return checked(flag, value, math.isfinite(value), "it must be finite")


def numbers(flag: str, text: str, count: int) -> tuple[float, ...]:
    """`count` finite numbers, with commas between them in `text`."""
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        found = ()
    checked(flag, text, len(found) == count and all(map(math.isfinite, found)),
            f"{count} numbers with commas between them")
    return found


def moment(date: str) -> int | None:
    """The second at which an ISO 8601 date begins, in UTC where it names no zone; None if it is no date."""
    try:
        found = datetime.fromisoformat(date)
    except ValueError:
        return None
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())

"""Resolve `codebook_size: auto`, and check integers in the configuration."""

import reprlib

from common.errors import ConfigError

MAX_LAYERS, MAX_WIDTH = 256, 65_536  # of an encoder


def codebook_size(size: int | str, num_items: int, where: str, max_size: int = 256) -> int:
    """Check the codebook size in the configuration, and return it as an integer.

    If `size` is "auto", return the largest power of two that is at most `num_items` / 4 and at most `max_size`, but at
    least 2.

    Raises ConfigError if `size` is neither "auto" nor an integer from 1 to `num_items`.
    """
    if size == "auto":
        return max(2, min(max_size, 1 << (max(num_items // 4, 1).bit_length() - 1)))
    number = at_least_one(size, f"{where}.codebook_size", "use --codebook_size auto",
                          "auto or an integer of at least 1")
    if number > num_items:
        raise ConfigError(f"{where}.codebook_size", f"must be at most {num_items} (the number of items), got {number}",
                          fix="use --codebook_size auto, or a smaller number")
    return number


def hidden_sizes(widths: object, where: str) -> list[int]:
    """Check the widths of an encoder's hidden layers, and return them.

    Raises ConfigError if `widths` is not a list of at most `MAX_LAYERS` integers from 1 to `MAX_WIDTH`.
    """
    if not isinstance(widths, list) or len(widths) > MAX_LAYERS or any(
            type(width) is not int or not 1 <= width <= MAX_WIDTH for width in widths):
        raise ConfigError(f"{where}.hidden_sizes", f"must be a list of at most {MAX_LAYERS} integers from 1 to "
                          f"{MAX_WIDTH}, got {reprlib.repr(widths)}",
                          fix="use a list such as --hidden_sizes [512,256,128]")
    return widths


def at_least_one(value: object, where: str, fix: str = "correct the value",
                 wanted: str = "an integer of at least 1") -> int:
    """Check that a value of the configuration is an integer >= 1, and return it.

    Raises ConfigError if the value is anything else. In the error message, `wanted` describes the allowed values.
    """
    if type(value) is not int or value < 1:  # `isinstance` would accept a bool
        raise ConfigError(where, f"must be {wanted}, got {value!r}", fix=fix)
    return value

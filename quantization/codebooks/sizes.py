"""Resolution of `codebook_size: auto`, and checks of integers in the configuration."""

from common.errors import ConfigError


def codebook_size(size: int | str, num_items: int, where: str, max_size: int = 256) -> int:
    """Return the codebook size; `auto` is the largest power of two <= items / 4, at most `max_size`.

    Raises ConfigError if the size is not an integer from 1 to `num_items`.
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
    """Return the widths of an encoder's hidden layers. Raises ConfigError if they are not a list of integers >= 1."""
    if not isinstance(widths, list) or any(type(width) is not int or width < 1 for width in widths):
        raise ConfigError(f"{where}.hidden_sizes", f"must be a list of integers of at least 1, got {widths!r}",
                          fix="use a list such as --hidden_sizes [512,256,128]")
    return widths


def at_least_one(value: object, where: str, fix: str = "correct the value",
                 wanted: str = "an integer of at least 1") -> int:
    """Return the value. Raises ConfigError if it is not an integer >= 1; `wanted` describes the allowed values."""
    if type(value) is not int or value < 1:  # `isinstance` would accept a bool
        raise ConfigError(where, f"must be {wanted}, got {value!r}", fix=fix)
    return value

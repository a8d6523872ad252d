"""How many levels and codewords: `auto`, and errors that name both numbers."""

from common.errors import ConfigError


def codebook_size(size: int | str, num_items: int, where: str, max_size: int = 256) -> int:
    """`auto` is the largest power of two up to a quarter of the items, at most `max_size`."""
    if size == "auto":
        return max(2, min(max_size, 1 << (max(num_items // 4, 1).bit_length() - 1)))
    number = at_least_one(size, f"{where}.codebook_size", "--codebook_size auto", "auto or at least 1")
    if number > num_items:
        raise ConfigError(f"{where}.codebook_size", f"is {number}", f"there are only {num_items} items",
                          "--codebook_size auto, or a smaller number")
    return number


def hidden_sizes(widths: object, where: str) -> list[int]:
    """The widths of an encoder's hidden layers, if they are a list of whole numbers above 0."""
    if not isinstance(widths, list) or any(type(width) is not int or width < 1 for width in widths):
        raise ConfigError(f"{where}.hidden_sizes", f"is {widths!r}", "it must be a list of widths of at least 1",
                          "--hidden_sizes [512,256,128]")
    return widths


def at_least_one(value: object, where: str, fix: str = "correct the value", wanted: str = "at least 1") -> int:
    """The value, if it is a whole number above 0."""
    if type(value) is not int or value < 1:  # a bool is an int, too
        raise ConfigError(where, f"is {value!r}", f"it must be {wanted}", fix)
    return value

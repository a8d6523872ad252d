"""Search a printed text for the values in it, whatever the words around them."""

import re


def lines_with(text: str, *values: object) -> list[str]:
    """The lines that contain every value; a part of a longer word or number does not count."""
    patterns = [rf"(?<![\w.,]){re.escape(str(value))}(?!\w|[.,]\d)" for value in values]
    return [line for line in text.splitlines() if all(re.search(pattern, line) for pattern in patterns)]

"""Find the lines of a text that contain given values. The other words of a line do not matter."""

import re


def lines_with(text: str, *values: object) -> list[str]:
    """Return the lines that contain all values, each as a whole word or number."""
    patterns = [rf"(?<![\w.,]){re.escape(str(value))}(?!\w|[.,]\d)" for value in values]
    return [line for line in text.splitlines() if all(re.search(pattern, line) for pattern in patterns)]

"""Cleaning of the texts that come with items."""

import html
import re

TAG = re.compile(r"<(?:[/!?]?[A-Za-z]|!--)[^<>]{0,500}>")  # "width < 5, height > 3" has none


def clean(value: object) -> str:
    """Plain text of a field: lists joined, HTML tags and entities gone, white space single.

    What is no text becomes the empty string; characters that no encoding can hold become `?`.
    """
    if value is None:
        return ""
    text = " ".join(str(part) for part in value) if isinstance(value, list | tuple) else str(value)
    text = TAG.sub(" ", html.unescape(text))
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, cut between words, and never to nothing."""
    if len(text) <= limit:
        return text
    head = text[: limit + 1].rsplit(None, 1)[0]
    return head if len(head) <= limit else text[:limit]

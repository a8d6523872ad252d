"""Convert a JSON file to JSON lines:  python dataloader/readers/json_lines.py FILE KEY [ITEM TIME] > NEW.jsonl

The file can have an array of records, records that span several lines, an object with one record per key, a table of
pandas (`to_json`), or an object with a list of records, such as {"data": [{...}, {...}]}. Records that are the values
of an object get their key in the field KEY. The members of a list become events: {"u1": ["i1", "i2"]} gives {KEY: "u1",
ITEM: "i1", TIME: 0} and {KEY: "u1", ITEM: "i2", TIME: 1}.
"""

import gzip
import json
import re
import sys
from collections.abc import Iterator

BLANK = re.compile(r"\s*")


def documents(text: str) -> Iterator[object]:
    """Yield the JSON values of a text. There may be blanks or line breaks between them."""
    at, decoder = BLANK.match(text).end(), json.JSONDecoder()
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        yield value
        at = BLANK.match(text, at).end()


def records(document: object, key: str, item: str = "item_id", time: str = "timestamp") -> Iterator[object]:
    """Yield the records in a JSON value."""
    values = list(document.values()) if isinstance(document, dict) else []
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    if isinstance(document, list):
        yield from document
    elif values and all(isinstance(value, dict) for value in values):
        if key in document or list(values[0]) == [str(row) for row in range(len(values[0]))]:  # a column per key
            for row in values[0]:
                yield {key: row, **{name: column.get(row) for name, column in document.items()}}
        else:
            yield from ({key: name, **record} for name, record in document.items())
    elif {"columns", "data"} <= set(document):  # pandas with orient="split"
        yield from (dict(zip(document["columns"], row, strict=False)) for row in document["data"])
    elif len(lists) == 1:
        yield from lists[0]
    elif values and all(isinstance(value, list) for value in values):
        for name, members in document.items():
            for place, member in enumerate(members):
                yield {key: name, **(member if isinstance(member, dict) else {item: member, time: place})}
    else:
        yield document


def main(path: str, *names: str) -> None:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig") as file:
        found = list(documents(file.read()))
    for record in records(found[0], *names) if len(found) == 1 else found:
        print(json.dumps(record))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {sys.argv[1]}: is not JSON in UTF-8: {error}")

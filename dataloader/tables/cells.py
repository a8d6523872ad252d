"""SQL that converts the raw values of an item record, which are JSON, to plain text."""

import html
import json
import re

from common.tables import text
from dataloader.readers.lines import MAX_FIELD, NO_RECORD, STRING, python_as_json
from dataloader.workspace import Workspace

# The text fields. If the value of a field is a list, its members are joined with this separator.
SEPARATORS = {"title": " ", "description": " ", "brand": " ", "price": " ", "categories": ", ", "features": " ",
              "year": " ", "genres": ", "}
TAG = r"<(?:[/!?]?[A-Za-z]|!--)[^<>]{0,500}>"    # an HTML tag; does not match "width < 5, height > 3"
BLANK = r"\s\x0b\x1c-\x1f\x{85}\p{Z}"
# UNEVEN matches all white space except a single space, because replacing a space by a space would only take time.
ODD_BLANK = (r"[\t-\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
             f"[{BLANK}]*")
UNEVEN = f" [{BLANK}]+|{ODD_BLANK}"
# A price or a range of prices; some price fields contain fragments of HTML pages instead.
PRICE = r"^\$?\d[\d,.]*(?: ?- ?\$?\d[\d,.]*)?$"
# A list of texts as NumPy prints it, such as ['a' 'b'], and a member before another one.
ARRAY, MEMBER = re.compile(rb"\[\s*%b(?:\s+%b)+\s*\]" % (STRING, STRING)), re.compile(STRING + rb"\s+(?=['\"])")
NESTED = "[[["     # the beginning of a JSON value that is nested too deeply for a text
NO_TEXT = "{}"     # the note of an object without text
TEXT_KEYS = ("name", "title", "value", "text")       # the text of an object is the first of these fields with a text
IMAGE_KEYS = ("large", "hi_res", "thumb", "url")     # the URL of an image in several sizes
MISSING = ("\\N", "nan", "NaN", "<NA>")              # texts that mean a missing value
MISSING_IF_REPEATED = ("None", "null", "NULL")       # these may also be the title of a single item


def _image_in(place: str) -> str:
    """Return SQL for the URL in an object with one image, or with lists of images. `place` is its JSON path."""
    return "coalesce({})".format(", ".join(
        f"""CASE json_type(image, '{place}.{key}') WHEN 'VARCHAR' THEN image ->> '{place}.{key}'
            WHEN 'ARRAY' THEN image ->> '{place}.{key}[0]' END""" for key in IMAGE_KEYS))


# SQL for the URL of the main image of an item. The field `image` can be a URL, an object with the URLs of one image in
# several sizes (or of several images, in lists), or a list of both. The first image of a list is the main one.
IMAGE_URL = f"""nullif(CASE json_type(image) WHEN 'VARCHAR' THEN image ->> '$' WHEN 'OBJECT' THEN {_image_in('$')}
    WHEN 'ARRAY' THEN CASE json_type(image, '$[0]') WHEN 'VARCHAR' THEN image ->> '$[0]'
        WHEN 'OBJECT' THEN {_image_in('$[0]')} END END, '')"""


def register(work: Workspace) -> None:
    """Register the Python functions that the SQL of this module calls."""
    work.connection.create_function("unescape", html.unescape, ["VARCHAR"], "VARCHAR")
    work.connection.create_function("list_in_cell", list_in_cell, ["VARCHAR"], "VARCHAR")


def list_in_cell(cell: str) -> str:
    """Convert a text that contains an object, or a list of texts and objects, to JSON. Return "" for other texts.

    The text can be in the notation of JSON or Python, or a list in the notation of NumPy, which has no commas.
    """
    raw = cell.encode()
    if ARRAY.fullmatch(raw):
        raw = MEMBER.sub(rb"\1, ", raw)
    for convert in (bytes, python_as_json):
        try:
            found = json.loads(convert(raw))
        except NO_RECORD:
            continue
        if isinstance(found, dict) or (isinstance(found, list) and all(isinstance(m, str | dict) for m in found)):
            return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace").decode()
    return ""


def note(field: str, missing: tuple[str, ...] | None) -> str:
    """Return SQL for a raw value as text if it means a missing value, else NULL.

    missing: the texts that mean a missing value; None: the defaults
    """
    raw, texts = f"{field}::VARCHAR", (*MISSING, *MISSING_IF_REPEATED) if missing is None else missing
    # The values are compared as JSON, because it would take time to decode them. A number can be NaN as well.
    forms = sorted({"NaN", *(json.dumps(value, ensure_ascii=ascii) for value in texts for ascii in (True, False))})
    # DuckDB evaluates all parts of an AND, but only the necessary parts of a CASE.
    return f"""CASE WHEN strlen({raw}) <= {max(len(form.encode()) for form in forms)} THEN
                    CASE WHEN {raw} IN ({', '.join(map(text, forms))}) THEN {field} ->> '$' END END"""


def value(field: str) -> str:
    """Return SQL for a raw value, or NULL if it has a note. A text that contains a list or an object becomes it."""
    raw = f"{field}::VARCHAR"
    return f"""CASE WHEN {field}_note IS NOT NULL THEN NULL
                    WHEN starts_with({raw}, '"[') OR starts_with({raw}, '"{{') THEN
                    CASE WHEN wanted AND right({raw}, 2) IN (']"', '}}"')
                         THEN coalesce(nullif(list_in_cell({field} ->> '$'), '')::JSON, {field}) ELSE {field} END
                    ELSE {field} END"""


def note_of_object(field: str, found: str) -> str:
    """Return SQL for `<field>_note`, or NO_TEXT if the value is an object or a list of objects without text.

    found: SQL for the text of the value
    """
    return f"""CASE WHEN wanted AND left({field}::VARCHAR, 2) IN ('{{}}', '{{"', '[{{') AND coalesce({found}, '') = ''
                    THEN '{NO_TEXT}' ELSE {field}_note END"""


def nested(field: str) -> str:
    return f"coalesce(starts_with({field}::VARCHAR, '{NESTED}'), false)"


def plain(field: str) -> str:
    """Return SQL for the text of a raw value. The members of a list, or of a list of lists, are joined."""
    raw = f"{field}::VARCHAR"
    all_members = [f"CASE WHEN starts_with({raw}, '[[') THEN {function}({field}, '$[*][*]') "
                   f"ELSE {function}({field}, '$[*]') END" for function in ("json_extract", "json_extract_string")]
    members = f"""CASE WHEN contains({raw}, '{{') THEN list_transform({all_members[0]}, lambda m:
                            CASE json_type(m) WHEN 'OBJECT' THEN {_text_of_object('m')} ELSE m ->> '$' END)
                       ELSE {all_members[1]} END"""
    return f"""CASE left({raw}, 1)
                    WHEN '[' THEN array_to_string(list_filter({members}, lambda m: m <> ''), '{SEPARATORS[field]}')
                    WHEN '{{' THEN {_text_of_object(field)} ELSE {field} ->> '$' END"""


def _text_of_object(value: str) -> str:
    return "coalesce({})".format(", ".join(
        f"""CASE WHEN json_type({value}, '$.{key}') IN ('VARCHAR', 'BIGINT', 'UBIGINT', 'DOUBLE')
            THEN nullif({value} ->> '$.{key}', '') END""" for key in TEXT_KEYS))


def clean(field: str) -> str:
    """Return SQL that removes HTML entities, tags and repeated spaces from the text `<field>_plain` of a field.

    If the field is missing, the text is empty.
    """
    # Each step evaluates the previous expression only once, because DuckDB would compute every further copy again.
    raw, whole = f"{field}::VARCHAR", f"{field}_plain"
    # `unescape` is a Python function and therefore slow, so call it only where it is needed.
    has_entity = f"contains({raw}, '&') OR contains({raw}, '\\u0026')"
    cleaned = f"""CASE WHEN strlen({raw}) > {MAX_FIELD} THEN unescape(left({whole}, {MAX_FIELD}))
                       WHEN {has_entity} THEN unescape({whole}) ELSE {whole} END"""
    # Remove tags after decoding the entities, because entities may encode a tag.
    for pattern, by in ((TAG, " "), (UNEVEN, " "), ("^ | $", "")):
        cleaned = f"regexp_replace({cleaned}, '{pattern}', '{by}', 'g')"
    if field == "price":
        cleaned = f"regexp_extract({cleaned}, '{PRICE}')"
    return f"coalesce({cleaned}, '')"

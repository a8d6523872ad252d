"""One line as a record: JSON and Python literals, which are never run."""

import ast
import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataloader.readers import lines as records
from dataloader.readers.lines import NO_RECORD, parse_json, parse_python, plain_json, python_as_json

TEXTS = st.text(st.sampled_from("'\"\\ab{}[],: \n\t\r\x00\x0b\x1c\x85é日🍼\u2028\ud800") | st.characters(), max_size=20)
TEXTS |= st.sampled_from(["None", "True or False", "it's", 'say "hi"', "\\", "\\'", "\\\\", "\\u0041", "{'a': 'b'}"])
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(TEXTS | st.none() | st.booleans() | NUMBERS,
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4)
                      | st.tuples(inner, inner), max_leaves=12)
RECORDS = st.dictionaries(TEXTS, VALUES, max_size=5)
PLAIN = settings(max_examples=400, deadline=None, derandomize=True, database=None)


@pytest.mark.slow
@PLAIN
@given(RECORDS)
@example({"a": "it's \"odd\"", "b": None, "c": [True, (1, 2.5)], "d": {"e": "\ud83d\ude00"}})
def test_repr_of_python_is_read_as_python_reads_it(record):
    line = repr(record).encode("utf-8", "backslashreplace")  # as `repr` writes a single surrogate
    assert same(parse_python(line), ast.literal_eval(line.decode()))


TOKENS = ["'a'", '"b"', "'it\\'s'", '"\\x41"', "'\\u00e9'", "'\\ud83d'", "'\\ude00'", "'\\N{BULLET}'", "'\\101'",
          "'\\a'", "'\\/'", "'\\\n'", "1", "-1", "+1", "- 1", "1.5", "1.", ".5", "01", "1_0", "0x1f", "1e5", "1j",
          "None", "True", "False", "'None'", "[None]", "(1,)", "()", "{}", "{'x':True}", "NaN", "inf", "u'c'", "b'd'",
          "r'\\e'", "\t", " # x", "'" * 3, '"', "'", "\\", "*", "[", "]", ",", ":"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@PLAIN
@given(st.lists(st.tuples(st.sampled_from(TOKENS), st.lists(st.sampled_from(TOKENS), min_size=1, max_size=3)).map(
    lambda pair: f"{pair[0]}:{''.join(pair[1])}"), max_size=3).map(",".join))
@example("'a':'''b'c'''")
@example("'a':'b''c'")
@example("'\\ud83d':'\\ud83d\\ude00'")
@example("'a':'" + "\\" * 7 + "'")
def test_every_dict_literal_is_read_as_python_reads_it(text):
    text = "{" + text + "}"
    try:
        expected = ast.literal_eval(text)
    except NO_RECORD:
        return  # JSON's parser takes a little more, such as `true`
    if isinstance(expected, dict):
        assert same(parse_python(text.encode("utf-8", "surrogatepass")), expected)


def same(one: object, other: object) -> bool:
    """Equal, with tuples read as the lists that JSON has, and 1, 1.0 and True kept distinct."""
    return repr(listed(one)) == repr(listed(other))


def listed(value: object) -> object:
    if isinstance(value, list | tuple):
        return [listed(part) for part in value]
    return {key: listed(part) for key, part in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("literal", [
    "{'a': 'b', 'c': ['d', 1.5, -2], 'e': {}}", "{'a': \"it's\"}", "{'a': 'say \"hi\"'}", "{'a': 'both \\' and \"'}",
    "{'a': 'tab\\tnew\\nline\\\\ \\xe9\\u2122'}", "{'a': None, 'b': True, 'c': [False]}", "{'a': 'None \"of\" it'}"])
def test_common_literals_need_no_slow_parser(monkeypatch, literal):
    expected = ast.literal_eval(literal)
    monkeypatch.setattr(records.ast, "literal_eval", None)
    assert parse_python(literal.encode()) == expected


HOSTILE = ["__import__('os').system('touch {canary}')", "[c for c in ().__class__.__base__.__subclasses__()]",
           "open('{canary}', 'w')", "(lambda: open('{canary}', 'w'))()", "f'{{open(\"{canary}\", \"w\")}}'",
           "'%s' % open('{canary}', 'w')", "open", "1 + 1", "'a' * 10**10", "10 ** 10 ** 10", "...", "x := 1"]


@pytest.mark.parametrize("code", HOSTILE)
@pytest.mark.parametrize("frame", ["{{'a': {}}}", "{{{}: 'a'}}", "{{'a': ['b', {{'c': {}}}]}}", "{{**{}}}", "{}"])
def test_code_is_refused_and_never_run(tmp_path, code, frame):
    canary = tmp_path / "canary"
    line = frame.format(code.format(canary=canary)).encode()
    try:
        record = parse_python(line)
    except NO_RECORD:
        pass
    else:
        assert code == "..."  # a literal in Python, without any effect
        assert plain_json(record, ["a"], [])
    assert not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize("line", [
    b"'" * 1_000_001, b'"\\' * 500_000, b"\\" * 1_000_001, b"{'a': '" + b"\\'" * 500_000, b"'\"" * 500_000 + b"'",
    b"[" * 1_000_000, b"-" * 1_000_000 + b"1", b"{'a': [" + b"None," * 300_000, b"{'a': " + b"('b'," * 100_000])
def test_a_hostile_megabyte_is_refused_quickly(line):
    begun = time.monotonic()
    with pytest.raises(NO_RECORD):
        parse_python(line)
    assert time.monotonic() - begun < 5


def test_a_long_literal_does_not_reach_python_s_parser(monkeypatch):
    monkeypatch.setattr(records.ast, "literal_eval", None)
    assert parse_python(b"{'a': [" + b"None," * 400_000 + b"None]}") == {"a": [None] * 400_001}
    with pytest.raises(json.JSONDecodeError):
        parse_python(b"{'a': [" + b"1_0," * 400_000 + b"1]}")


@pytest.mark.parametrize("parse", [parse_json, parse_python])
@pytest.mark.parametrize(("line", "value"), [
    (b"[1]", "list"), (b"5", "int"), (b'"x"', "str"), (b"", ""), (b"{", ""), (b'{"a": 1} {"a": 2}', ""),
    (b'{"a": "\xff"}', "0xff"), (b'{"a": "' + b"x" * (32 << 20) + b'"}', "33,554,432")])
def test_a_line_without_a_record_is_an_error(parse, line, value):
    with pytest.raises(NO_RECORD) as error:
        parse(line)
    assert value in str(error.value)


def test_a_byte_order_mark_does_no_harm():
    assert parse_json(b'\xef\xbb\xbf{"a": "b"}\r\n') == {"a": "b"}
    assert parse_python(b"\xef\xbb\xbf{'a': 'b'}\r\n") == {"a": "b"}


@pytest.mark.parametrize("text", ["{'a': \"b", "{'a': 'b'} \\", "{'a': '\\a'}", "{'a': '\\u12'}", "{'a': '\\ud800'}"])
def test_literals_that_json_cannot_express_are_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 (any: the caller tries another parser)
        python_as_json(text.encode())


@pytest.mark.slow
@PLAIN
@given(st.dictionaries(st.sampled_from("abc"), VALUES))
def test_plain_json_has_the_wanted_fields_with_a_value(record):
    line = plain_json(record, ["a", "b"], [])
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert set(json.loads(line)) == {key for key in "ab" if record.get(key) is not None}


def test_plain_json_keeps_numbers_and_shortens_texts():
    record = {"a": "x" * 1_000_001, "b": ["\ud800y", 5, 1.5, True, None, {"c": ("z",)}], "d": b"raw", "id": "\ud800"}
    line = plain_json(record, ["a", "b", "d", "id", "other"], ["id"])
    assert json.loads(line) == {"a": "x" * 1_000_000, "b": ["?y", 5, 1.5, True, None, {"c": ["z"]}], "d": "b'raw'"}

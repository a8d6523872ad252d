import errno

import pytest

from common.errors import ConfigError, UserError, closest, mask_secrets, naming, nearest


@pytest.mark.parametrize(("parts", "line"), [
    (("a.yaml:3", "unknown key 'x'", "It is new", "remove it"), "a.yaml:3: unknown key 'x'. It is new. Fix: remove it"),
    (("a.yaml:3", "unknown key 'x'", "Is it 'y'?", "correct it"),
     "a.yaml:3: unknown key 'x'. Is it 'y'? Fix: correct it"),
    (("a.npy", "not there.", "", "make it"), "a.npy: not there. Fix: make it")])
def test_an_error_says_where_what_why_and_the_fix(parts, line):
    assert str(UserError(*parts)) == line


@pytest.mark.parametrize("end", ["\n", "\r", "\u2028", "\x85"])
def test_a_text_of_a_file_cannot_add_a_line(end):
    text = f"x{end}error: forged"
    error = ConfigError(text, text, text, text)
    assert len(str(error).splitlines()) == 1
    assert len(str(ConfigError("a", "b" * 100_000, "c" * 100_000, "d" * 100_000))) < 20_000


def test_an_error_without_a_fix_names_the_help():
    start, _, fix = str(UserError("a.npy", "not there")).partition(" Fix: ")
    assert start == "a.npy: not there."
    assert "--help" in fix


@pytest.mark.parametrize(("name", "known", "suggestion"), [
    ("epoch", ["epochs", "lr"], "epochs"), ("LR", ["epochs", "lr"], "lr"), ("adamw", ["Adam", "AdamW"], "AdamW"),
    ("batchsize", ["batch_size", "eval_batch_size"], "batch_size"),
    ("lr_rate", ["lr_schedule", "run_root", "lr"], "lr"),
    ("quantizer", ["quantization", "quantizer_name"], "quantizer_name"),
    ("dataset_nam", ["dataset", "dataset_name"], "dataset_name")])
def test_the_nearest_name_is_suggested_alone(name, known, suggestion):
    assert closest(name, known) == suggestion
    assert [other for other in known if f"'{other}'" in nearest(name, known)] == [suggestion]


def test_without_a_near_name_all_are_listed_in_order():
    assert closest("xyz", ["epochs", "batch"]) is None
    assert nearest("xyz", ["epochs", "batch"]).endswith("batch, epochs")
    assert closest("xyz", []) is None
    assert nearest("xyz", [])


@pytest.mark.parametrize(("text", "masked"), [
    ("--mirror=https://me:a@b:c@host:8/x?token=t&id=", "--mirror=https://***@host:8/x?token=***&id=***"),
    ("'https://key@host', again in 1 s", "'https://***@host', again in 1 s"),
    ("Max retries exceeded with url: /x/y?sig=ab%2F=&n=1 (Caused by)",
     "Max retries exceeded with url: /x/y?sig=***&n=*** (Caused by)"),
    ("http://host/a@b/c and me@host, did you mean 'x'? a=b", "http://host/a@b/c and me@host, did you mean 'x'? a=b"),
])
def test_secrets_in_addresses_are_masked(text, masked):
    assert mask_secrets(text) == masked


@pytest.mark.parametrize(("named", "expected"), [((), "metrics.jsonl"), (("run.log",), "run.log")])
def test_an_error_without_a_path_gets_one(named, expected):
    with pytest.raises(OSError, match="full") as raised, naming("metrics.jsonl"):
        raise OSError(errno.ENOSPC, "full", *named)
    assert raised.value.filename == expected


def test_long_values_are_cut():
    long = "u" * 1_000_000  # without the limits, this test would take hours
    error = UserError("--user", f"unknown user {mask_secrets(long)}", nearest(long, ["u" * 300, "v"]))
    assert len(str(error)) < 5_000

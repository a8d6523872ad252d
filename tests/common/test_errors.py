import pytest

from common.errors import UserError, nearest, without_secrets


@pytest.mark.parametrize(("parts", "line"), [
    (("a.yaml:3", "unknown key 'x'", "it is new", "remove it"), "a.yaml:3: unknown key 'x'. it is new. Fix: remove it"),
    (("a.yaml:3", "unknown key 'x'", "did you mean 'y'?", "correct it"),
     "a.yaml:3: unknown key 'x'. did you mean 'y'? Fix: correct it"),
    (("a.npy", "not there.", "", "make it"), "a.npy: not there. Fix: make it"),
    (("a.npy", "not there"), "a.npy: not there. Fix: see --help")])
def test_an_error_says_where_what_why_and_the_fix(parts, line):
    assert str(UserError(*parts)) == line



@pytest.mark.parametrize(("name", "known", "suggestion"), [
    ("epoch", ["epochs", "lr"], "did you mean 'epochs'?"),
    ("LR", ["epochs", "lr"], "did you mean 'lr'?"),
    ("adamw", ["Adam", "AdamW"], "did you mean 'AdamW'?"),
    ("batchsize", ["batch_size", "eval_batch_size"], "did you mean 'batch_size'?"),
    ("xyz", ["epochs", "batch"], "there are: batch, epochs"),
    ("xyz", [], "there are: none")])
def test_the_nearest_name_is_suggested_or_all_are_listed(name, known, suggestion):
    assert nearest(name, known) == suggestion



@pytest.mark.parametrize(("text", "masked"), [
    ("--mirror=https://me:a@b:c@host:8/x?token=t&id=", "--mirror=https://***@host:8/x?token=***&id=***"),
    ("'https://key@host', again in 1 s", "'https://***@host', again in 1 s"),
    ("Max retries exceeded with url: /x/y?sig=ab%2F=&n=1 (Caused by)",
     "Max retries exceeded with url: /x/y?sig=***&n=*** (Caused by)"),
    ("http://host/a@b/c and me@host, did you mean 'x'? a=b", "http://host/a@b/c and me@host, did you mean 'x'? a=b"),
])
def test_secrets_in_addresses_are_masked(text, masked):
    assert without_secrets(text) == masked


"""The examples of docs/extending.md. Tests run them as they are printed there."""

import re

from common.cli import ROOT

PAGE = ROOT / "docs" / "extending.md"

BLOCK_OR_HEADING = re.compile(r"^## ([^\n]+?) *$|^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_by_section(text: str) -> dict[tuple[str, str], list[str]]:
    """Return `(heading of the section, language) -> code blocks`. A line `## ...` in a code block is not a heading."""
    section, blocks = "", {}
    for heading, language, code in BLOCK_OR_HEADING.findall(text):
        if heading:
            section = heading
        else:
            blocks.setdefault((section, language), []).append(code)
    return blocks


def example(section: str, language: str) -> str:
    """Return the code block of this language in the section, which must have exactly one."""
    found = blocks_by_section(PAGE.read_text(encoding="utf-8")).get((section, language), [])
    assert len(found) == 1, f"{PAGE}: the section {section!r} has {len(found)} blocks of {language}, expected 1"
    return found[0]


QUANTIZER, QUANTIZER_CONFIG = (example("Add a quantizer", language) for language in ("python", "yaml"))
RECOMMENDER, RECOMMENDER_CONFIG = (example("Add a recommender", language) for language in ("python", "yaml"))
FAMILY, FAMILY_CONFIG = (example("Add a dataset family", language) for language in ("python", "yaml"))
METRIC = example("Add a metric", "python")

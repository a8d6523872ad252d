"""The README's examples of a new model, each with its YAML."""

import re

from common.cli import ROOT

_TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
[QUANTIZER, RECOMMENDER] = re.findall(r"```python\n(.*?)```", _TEXT, re.S)
[QUANTIZER_CONFIG, RECOMMENDER_CONFIG] = re.findall(r"```yaml\n(.*?)```", _TEXT, re.S)

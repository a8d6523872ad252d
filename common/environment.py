"""Check whether the running Python and its packages satisfy a requirements file.

    python common/environment.py requirements.txt

The exit code is 0 if all requirements are satisfied. Otherwise, the command prints the missing ones and exits with 1.
"""

# This file must import only the standard library.

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OPERATORS = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "==": lambda a, b: a == b,
             "<": lambda a, b: a < b, ">": lambda a, b: a > b}


def missing(lines: list[str]) -> list[str]:
    """Return the requirements that the running Python does not satisfy.

    Each line contains one requirement, such as `name>=1.2,<3`.
    """
    unmet = [] if sys.version_info >= (3, 11) else ["python>=3.11"]
    for line in lines:
        requirement = line.split("#")[0].strip()
        if not requirement:
            continue
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        try:
            installed = _release(version(name))
        except PackageNotFoundError:
            unmet.append(requirement)
            continue
        for operator, bound in re.findall(r"(>=|<=|==|<|>)\s*([0-9.]+)", requirement):
            wanted = _release(bound)
            if not OPERATORS[operator](installed, wanted):
                unmet.append(f"{requirement} (installed: {version(name)})")
                break
    return unmet


def _release(text: str) -> list[int]:
    """Return the release number of a version without trailing zeros: `2.13.0+cpu` -> [2, 13]."""
    numbers = [int(n) for n in re.split(r"[^0-9.]", text)[0].strip(".").split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


if __name__ == "__main__":
    unmet = [m for path in sys.argv[1:] for m in missing(Path(path).read_text(encoding="utf-8").splitlines())]
    print("\n".join(unmet) or "satisfied")
    sys.exit(bool(unmet))

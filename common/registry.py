"""Plug-ins: classes that are found by the name of their file."""

import importlib
from pathlib import Path
from typing import Any

from common.errors import ConfigError, closest, nearest

plug_in_files: set[str] = set()  # the files of the plug-ins that this process has loaded


def unknown(flag: str, name: str, kind: str, known: list[str], files: str) -> ConfigError:
    """The error for a name that no plug-in has; `files` are those that would add one."""
    close = closest(name, known)
    return ConfigError(f"{flag} {name}", f"there is no such {kind}", nearest(name, known),
                       f"{flag} {close}" if close else f"one of {', '.join(known)}; or add {files}")


def load_class(path: Path, module: str, name: str, base: type) -> type[Any]:
    """The class in the file `path`, imported as `module`, with the plug-in's name, whatever the case and underscores.

    Raises ConfigError if the file is missing, or has no such class derived from `base`.
    """
    if not path.exists():
        raise ConfigError(path, "not there", f"a YAML names the plug-in {name!r}", "add the file")
    plug_in_files.add(str(path))
    for attribute, value in vars(importlib.import_module(module)).items():
        if _plain(attribute) == _plain(name) and isinstance(value, type) and issubclass(value, base):
            return value
    raise ConfigError(path, f"has no class {name.replace('_', '').upper()} derived from {base.__name__}",
                      fix=f"name a class like {name!r}, in any case, and derive it from {base.__name__}")


def _plain(name: str) -> str:
    return name.replace("_", "").lower()

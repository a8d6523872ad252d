"""Plug-ins: model classes that are found by the name of their file."""

import importlib
from pathlib import Path
from typing import Any

from common.errors import ConfigError, closest, nearest

plug_in_files: set[str] = set()  # files of the plug-ins that this process has loaded


def unknown(flag: str, name: str, kind: str, known: list[str], files: str) -> ConfigError:
    """Return the error for an unknown plug-in; `files` are the files that the user has to add for a new one."""
    close = closest(name, known)
    return ConfigError(f"{flag} {name}", f"unknown {kind}", nearest(name, known),
                       f"use {flag} {close}" if close else f"use one of {', '.join(known)}, or add {files}")


def load_class(path: Path, module: str, name: str, base: type) -> type[Any]:
    """Return the class of the plug-in `name` from the file `path`, which is imported as `module`.

    The class has the plug-in's name, except for case and underscores. Raises ConfigError if the file is missing, or has
    no such class derived from `base`.
    """
    if not path.exists():
        raise ConfigError(path, "not found", f"A YAML file exists for the plug-in {name!r}", "add the file")
    plug_in_files.add(str(path))
    for attribute, value in vars(importlib.import_module(module)).items():
        if _plain(attribute) == _plain(name) and isinstance(value, type) and issubclass(value, base):
            return value
    raise ConfigError(path, f"has no class {name.replace('_', '').upper()} derived from {base.__name__}",
                      fix=f"define a class named like {name!r}, in any case, and derive it from {base.__name__}")


def _plain(name: str) -> str:
    return name.replace("_", "").lower()

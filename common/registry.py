"""Loads plug-ins. A plug-in is a model class that is found by the name of its file."""

import importlib
from pathlib import Path
from typing import Any

from common.errors import ConfigError, closest, nearest

plug_in_files: set[str] = set()  # files of the plug-ins that this process has loaded


def unknown(flag: str, name: str, kind: str, known: list[str], files: str) -> ConfigError:
    """Return the error for the plug-in `name`, which does not exist.

    `kind` is the word for such a plug-in in the error, such as "quantizer". `files` names the files that the user has
    to add to make a new plug-in.
    """
    close = closest(name, known)
    return ConfigError(f"{flag} {name}", f"unknown {kind}", nearest(name, known),
                       f"use {flag} {close}" if close else f"use one of {', '.join(known)}, or add {files}")


def load_class(path: Path, module: str, name: str, base: type) -> type[Any]:
    """Import the file `path` under the module name `module`, and return the class of the plug-in `name`.

    The class must have the name of the plug-in; case and underscores do not matter. Raises ConfigError if the file is
    missing, or if the file has no class that has this name and is derived from `base`.
    """
    if not path.exists():
        raise ConfigError(path, "not found", f"A YAML file exists for the plug-in {name!r}", "add the file")
    plug_in_files.add(str(path))
    for attribute, value in vars(importlib.import_module(module)).items():
        if _plain(attribute) == _plain(name) and isinstance(value, type) and issubclass(value, base):
            return value
    raise ConfigError(path, f"has no class {name.replace('_', '').upper()} derived from {base.__name__}",
                      fix=f"define a class with the name {name!r} (in any case) that is derived from {base.__name__}")


def _plain(name: str) -> str:
    return name.replace("_", "").lower()

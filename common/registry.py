"""Load plug-ins. A plug-in is a model class in a file of the same name."""

import importlib
from pathlib import Path
from typing import Any

from common.errors import ConfigError, closest, nearest
from common.reading import is_file_name

plug_in_files: set[str] = set()  # files of the plug-ins that this process has loaded


def unknown(flag: str, name: str, kind: str, known: list[str], files: str) -> ConfigError:
    """Return the error for a plug-in that does not exist.

    flag: the flag with the unknown `name`
    kind: the kind of plug-in, such as "quantizer"
    files: the files that a new plug-in needs, as text
    """
    close, more = closest(name, known), f", or add {files}" if is_file_name(name) else ""
    return ConfigError(f"{flag} {name}", f"unknown {kind}", nearest(name, known),
                       f"use {flag} {close}" if close else f"use one of {', '.join(known)}{more}")


def load_class(path: Path, module: str, name: str, base: type) -> type[Any]:
    """Import `module`, the Python file `path`, and return the class of the plug-in `name`.

    The class must be derived from `base` and have the name of the plug-in. Case and underscores do not matter. Raises
    ConfigError if the file or the class does not exist.
    """
    if not path.exists():
        raise ConfigError(path, "not found", f"The model {name!r} has a YAML file but no Python file",
                          "write the model's class in this file")
    plug_in_files.add(str(path))
    for attribute, value in vars(importlib.import_module(module)).items():
        if _plain(attribute) == _plain(name) and isinstance(value, type) and issubclass(value, base):
            return value
    raise ConfigError(path, f"has no class {name.replace('_', '').upper()} derived from {base.__name__}",
                      fix=f"name the class like the model {name!r} (upper or lower case), and derive it from "
                          f"{base.__name__}")


def _plain(name: str) -> str:
    return name.replace("_", "").lower()

"""Meta files: read them, and check that an artifact and its inputs have not changed since it was made."""

import reprlib
from pathlib import Path
from typing import Any, TypedDict

from common.errors import ArtifactError, DataError
from common.publishing import SCHEMA_VERSION, content_sha256, finish_publishing, is_unchanged, meta_path
from common.reading import COUNT, SHARE, Record, is_file_name, read_record, require_regular


class Fingerprint(TypedDict):
    """The entries of `publishing.fingerprint` that later commands read."""

    file: str
    sha256: str


class Step(TypedDict):
    """An entry of `filters`: the number of interactions that remain after a filter."""

    step: str
    interactions: COUNT


class HeldOut(TypedDict):
    """A number for each split with targets."""

    valid: COUNT
    test: COUNT


class InSplit(HeldOut):
    """A number for each split."""

    train: COUNT


# The types of the entries that any command reads. `REQUIRED` are in every meta file.
REQUIRED: dict[str, Any] = {"schema_version": int, "sha256": str, "size": COUNT, "inputs": dict[str, str]}
OPTIONAL: dict[str, Any] = {
    "command": str | None, "mtime_ns": int, "items_sha256": str, "num_items": COUNT, "num_users": COUNT,
    "num_interactions": COUNT, "num_in_split": InSplit, "num_repeats": HeldOut, "num_cold_items": HeldOut,
    "num_without_text": COUNT, "filters": list[Step], "settings": dict, "raw": dict[str, Fingerprint],
    "split_name": str, "counts": dict[str, COUNT], "model_files": dict[str, Fingerprint],
    "codebook_sizes": list[COUNT], "disambiguation_level": COUNT | None, "collision_rate_before": SHARE,
    "collision_rate_after": SHARE, "collapse": str | None, "run": str, "recommender": str,
}


def load_meta(path: Path, fix: str) -> Record:
    """Check that an artifact is up to date, and return the content of its meta file.

    `fix` is the command that makes the artifact. It is shown in errors. Raises DataError if the artifact is missing.
    Raises ArtifactError if the artifact is damaged or stale, or has another schema version. An artifact is stale if one
    of its input files has changed.

    The content is compared with the sha256 in the meta file. A large file is read only if its modification time differs
    from the time in the meta file (see `publishing.is_unchanged`).
    """
    return _load(path, fix, thorough=False)


def verify(path: Path, fix: str) -> Record:
    """Check an artifact as `load_meta` does, but always read its content, even if the file is large."""
    return _load(path, fix, thorough=True)


def _load(path: Path, fix: str, thorough: bool, dependents: tuple[Path, ...] = ()) -> Record:
    """Do the work of `load_meta`. `dependents` are the artifacts that have `path` as a direct or indirect input."""
    meta = _read(path, fix)
    size = path.stat().st_size
    same_size = size == meta["size"]
    if not same_size or ((thorough or not is_unchanged(path, meta)) and content_sha256(path) != meta["sha256"]):
        if _read(path, fix) != meta:  # another process has published the file since the first read
            return _load(path, fix, thorough, dependents)
        raise ArtifactError(path, "does not match the sha256 in its meta file" if same_size else
                            f"has {size} bytes, but its meta file says {meta['size']} bytes",
                            "The file was changed or damaged", meta.fix)
    for name, sha256 in meta["inputs"].items():
        source = path.parent / name
        if not is_file_name(name) or source in (path, *dependents):
            raise ArtifactError(meta.path, f"names {reprlib.repr(name)} as an input", "An input must be another file "
                                "in the same folder that is made before this file", meta.fix)
        # If the input itself has a problem, this call raises an error with the command that rebuilds the input.
        if _load(source, meta.fix, False, (path, *dependents))["sha256"] != sha256:
            raise ArtifactError(path, f"is stale: its input {name} has changed", fix=meta.fix)
    return meta


def _read(path: Path, fix: str) -> Record:
    """Return the content of a meta file. Raises ArtifactError if it is missing, is damaged or has another version."""
    finish_publishing(path)
    meta_file = meta_path(path)
    if not path.exists():
        raise DataError(path, "not found", fix=fix)
    try:
        require_regular(path)
    except OSError as error:
        raise ArtifactError(path, "cannot be read", str(error), fix) from error
    if not meta_file.exists():
        raise ArtifactError(path, "has no meta file", f"There is no {meta_file.name} in the same folder",
                            f"{fix}; or, if you made the file yourself, use --check --adopt")
    meta = read_record(meta_file, fix, {"schema_version": int}, {"command": str | None})
    meta.fix = _rebuild(meta, fix)
    if meta["schema_version"] != SCHEMA_VERSION:
        raise ArtifactError(meta_file, f"has schema version {meta['schema_version']}",
                            f"This code reads schema version {SCHEMA_VERSION}", meta.fix)
    meta.check(REQUIRED, OPTIONAL)
    return meta


def _rebuild(meta: Record, fix: str) -> str:
    """Return the command or instruction that makes an artifact again, or `fix` if the meta file has no command."""
    command, settings = meta.get("command"), meta.get("settings")
    if isinstance(settings, dict) and settings.get("adopted"):  # no command makes a file of the user
        return f"restore the file; or, if its new content is right, delete {meta.path} and run: {command or fix}"
    return f"{command} --force" if command else fix

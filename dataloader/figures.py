"""Step 1: fetch the images of the items, check each, and list which item has one."""

import hashlib
import logging
import os
import sys
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from common.artifacts import DatasetFolder, load_image_urls, load_meta
from common.cli import command_line
from common.command import run_command
from common.errors import DataError, ResourceError, UserError
from common.lock import FolderLock
from common.progress import Progress
from common.publishing import sweep, write_bytes
from common.run import log_to_console
from dataloader.images.figure_table import (
    Figure,
    counts_text,
    publish_figures,
    recorded_files,
    refuse_missing,
    report_missing,
)
from dataloader.images.pictures import BadPicture, check_picture, picture_size, set_up_pillow
from dataloader.network.ask import Answer, host_of
from dataloader.network.polite import Fetcher
from dataloader.options import DataOptions, parse_options

log = logging.getLogger(__name__)

ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".avif")
FINAL = {"ok", "placeholder", "no address", "bad address"}  # another run would say the same


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Fetch the images of the items.")
    log_to_console()
    fetch_figures(options, command_line("bash dataloader/1_load_figure.sh", argv))


def fetch_figures(options: DataOptions, command: str) -> None:
    """Fill `images/` with what is not there yet, and publish figures.parquet, one row an item.

    What is there is not asked for again. --force checks it again, to the last pixel, and fetches what is damaged.
    Raises ResourceError if not one image could be had, and DataError if one is missing under --missing_images error;
    the latter after figures.parquet has been written, which names the missing ones.
    """
    set_up_pillow()
    folder = options.folder
    folder.require()
    if options.force or not is_current(options):
        with FolderLock(folder.images):
            _fetch_and_publish(options, command)
    else:
        log.info("figures: reusing %s (%s)", folder.figures, counts_text(load_meta(folder.figures, command)["counts"]))
    if options.image.missing == "error":
        refuse_missing(folder)
    report_missing(folder)


def is_current(options: DataOptions) -> bool:
    """Whether nothing is left to fetch: all files lie there, and no failure may be better next time."""
    folder = options.folder
    try:
        meta = load_meta(folder.figures, "")
    except UserError:
        return False
    if meta["settings"] != _settings(options) or not set(meta["counts"]) <= FINAL:
        return False
    recorded = set(recorded_files(folder))
    return bool(recorded) and recorded <= _files(folder)


def _settings(options: DataOptions) -> dict:
    return {"min_image_side": options.image.min_side}


def _fetch_and_publish(options: DataOptions, command: str) -> None:
    folder = options.folder
    items = load_meta(folder.items, folder.make_command)
    urls = list(dict.fromkeys(url for url in load_image_urls(folder) if url))
    if not urls:
        raise DataError(folder.items, "no item has the address of an image", f"{items['num_items']} items",
                        "leave the modality image out, or take a --source whose items have images")
    figures = _fetch(options, urls)
    if not any(figure.file for figure in figures):
        raise ResourceError(folder.images, f"not one of {len(urls)} images could be fetched", _reasons(figures),
                            "check the network, then run the same command again")
    publish_figures(folder, figures, {
        "inputs": {folder.items.name: items["sha256"]}, "items_sha256": items["items_sha256"],
        "num_items": items["num_items"], "command": command, "settings": _settings(options)})


def _fetch(options: DataOptions, urls: list[str]) -> list[Figure]:
    """What lies in `images/` for every address, after all that is not there was asked for."""
    folder = options.folder
    _sweep(folder)
    figures = _kept(folder, urls, options.force)
    wanted = [url for url in urls if url not in figures]
    log.info("figures: %d of %d images are there already", len(figures), len(urls))
    failed = 0
    with Progress("figures", len(wanted), "images") as progress:
        for url, answer in Fetcher(wanted, options.image.rate).results():
            figures[url] = _accept(folder, url, answer)
            failed += not figures[url].file
            progress.update(1, failed=failed)
    return [_judged(figures[url], options.image.min_side) for url in urls]


def file_name(url: str) -> str:
    """Where the image of this address lies under `images/`; 256 folders share what may be millions."""
    name = hashlib.sha256(url.encode("utf-8")).hexdigest()[:32]
    ending = PurePosixPath(urlsplit(url).path).suffix.lower() if host_of(url) else ""
    return f"{name[:2]}/{name}{ending if ending in ENDINGS else ''}"


def _kept(folder: DatasetFolder, urls: list[str], check: bool) -> dict[str, Figure]:
    """The figures of the files that lie there; each was checked before it got its name, and is again with `check`."""
    there, recorded, figures = _files(folder), {} if check else recorded_files(folder), {}
    for url in urls:
        file = file_name(url)
        if file in there and file in recorded:
            figures[url] = Figure(url, "ok", "", file, *recorded[file])
        elif file in there:  # a run was stopped before it could write down what it had, or a check is wanted
            try:
                figures[url] = _figure(url, file, (folder.images / file).read_bytes(), check)
            except BadPicture as error:
                log.warning("figures: %s is no image any more, and is fetched again (%s)", file, error.detail)
    return figures


def _accept(folder: DatasetFolder, url: str, answer: Answer) -> Figure:
    """Keep what was fetched if it is a picture."""
    if answer.status != "fetched":
        return Figure(url, answer.status, answer.detail)
    try:
        figure = _figure(url, file_name(url), answer.body, check=True)
    except BadPicture as error:
        return Figure(url, error.status, error.detail)
    write_bytes(folder.images / figure.file, answer.body)
    return figure


def _figure(url: str, file: str, data: bytes, check: bool) -> Figure:
    width, height = check_picture(data) if check else picture_size(data)
    return Figure(url, "ok", "", file, width, height, hashlib.sha256(data).hexdigest())


def _judged(figure: Figure, min_side: int) -> Figure:
    if not figure.file or min(figure.width, figure.height) >= min_side:
        return figure
    return figure._replace(status="placeholder", detail=f"{figure.width} x {figure.height} pixels")


def _sweep(folder: DatasetFolder) -> None:
    """Remove what a killed run was writing; the caller holds the lock."""
    for shelf in folder.images.glob("*/"):
        sweep(shelf, "*")


def _files(folder: DatasetFolder) -> set[str]:
    return {f"{shelf.name}/{name}" for shelf in folder.images.glob("??") for name in os.listdir(shelf)}


def _reasons(figures: list[Figure]) -> str:
    """The commonest failures, each with an address."""
    found: dict[str, list[str]] = {}
    for figure in figures:
        found.setdefault(f"{figure.status} ({figure.detail})", []).append(figure.url)
    commonest = sorted(found.items(), key=lambda reason: -len(reason[1]))[:3]
    return "; ".join(f"{len(urls)} {reason}, such as {urls[0]}" for reason, urls in commonest)


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Step 1: download and check the images of the items, and list them in images.parquet."""

import hashlib
import logging
import os
import sys
from contextlib import suppress
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

import duckdb
import numpy as np

from common.artifacts import DatasetFolder, load_image_urls, load_items_meta, load_meta, reading_table
from common.cli import command_line
from common.command import run_command
from common.errors import ArtifactError, DataError, ResourceError, UserError
from common.lock import FolderLock
from common.progress import Progress
from common.publishing import publish, sweep, write_bytes
from common.run import log_to_console
from common.table_files import ids_sha256
from common.tables import parquet_rows, utf8_path
from dataloader.embeddings.image_decoding import BadImage, image_size, set_up_pillow
from dataloader.http import Fetcher, host_of
from dataloader.options import ImageFetchOptions, parse_options

log = logging.getLogger(__name__)

ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".avif")
FINAL = {"ok", "placeholder", "no address", "bad address"}  # statuses that another run would not change
NUM_LISTED = 10  # number of items without an image that a message names


class ImageRecord(NamedTuple):
    """The result for one URL. Only the statuses `ok` and `placeholder` have a file in `images/`."""

    url: str
    status: str  # ok or placeholder; without a file: bad address, unreachable, too large or not an image
    detail: str = ""
    file: str = ""
    width: int = 0
    height: int = 0
    sha256: str = ""


class ImageTable(NamedTuple):
    """The columns of images.parquet as arrays with one entry per item, in item order.

    `file` and `sha256` are None for items without an image file.
    """

    raw_id: np.ndarray   # object
    file: np.ndarray     # object, relative to `images/`
    sha256: np.ndarray   # object, of the file's bytes
    present: np.ndarray  # bool, whether the item has an image that is not a placeholder


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Download the images of the items.").images
    log_to_console()
    fetch_images(options, command_line("bash dataloader/1_load_figure.sh", argv))


def fetch_images(options: ImageFetchOptions, command: str) -> None:
    """Download the missing images to `images/`, and publish images.parquet with one row per item.

    With --force, existing images are decoded completely to check them. Raises ResourceError if no image could be
    downloaded. With --missing_images error, raises DataError at the end if an item has no image.
    """
    set_up_pillow()
    folder = options.folder
    folder.require()
    # `current` becomes True if all recorded files exist and another attempt would not change any status.
    current, recorded = False, _recorded_files(folder).keys()
    with suppress(UserError):
        meta = load_meta(folder.image_table, "")
        current = (meta["settings"] == {"min_image_side": options.min_side} and set(meta["counts"]) <= FINAL
                   and len(recorded) > 0 and recorded <= _files(folder))
    if options.force or not current:
        with FolderLock(folder.images):
            _fetch_and_publish(options, command)
    else:
        counts = load_meta(folder.image_table, command)["counts"]
        log.info("images: reusing %s (%s)", folder.image_table, _counts_text(counts))
    if options.missing == "error":
        refuse_missing(folder)
    num_missing, rows = _missing(folder)
    for raw_id, status, detail in rows:
        log.info("images:   %s: %s%s", raw_id, status, f" ({detail})" if detail else "")
    if num_missing:
        log.warning("images: %d items have no image; %s lists them all", num_missing, folder.image_table.name)


def _fetch_and_publish(options: ImageFetchOptions, command: str) -> None:
    """Download the missing images and publish images.parquet with one row per item.

    The columns are item, raw_id, url, file, status, detail, width, height and sha256.
    """
    folder = options.folder
    items = load_meta(folder.items, folder.make_command)
    urls = list(dict.fromkeys(url for url in load_image_urls(folder) if url))
    if not urls:
        raise DataError(folder.items, "no item has an image URL", f"The dataset has {items['num_items']} items",
                        "use no image embedding (--modalities, --suffix, --fusion_parts, --quantizer_name select it) "
                        "or a --source whose items have images")
    records = _fetch(options, urls)
    if not any(record.file for record in records):
        found: dict[str, list[str]] = {}
        for record in records:
            reason = record.status if record.status in FINAL else f"{record.status} ({record.detail})"
            found.setdefault(reason, []).append(record.url)
        commonest = sorted(found.items(), key=lambda reason: -len(reason[1]))[:3]
        why = "; ".join(f"{len(some)} images: {reason}, for example {some[0]}" for reason, some in commonest)
        if found.keys() <= FINAL:  # no network can help
            raise DataError(folder.items, "has no image address that can be used", why,
                            "use http or https addresses, or adopt an image embedding of your own with --check --adopt")
        raise ResourceError(folder.images, f"none of {len(urls)} images could be downloaded", why,
                            "check the network, then run the same command again")
    import pandas as pd  # this import takes a second, so it runs only after all flags have been checked

    with duckdb.connect() as connection:
        connection.register("images", pd.DataFrame(records, columns=ImageRecord._fields))
        table = connection.sql(f"""
            SELECT item, raw_id, image_url AS url, nullif(file, '') AS file,
                   coalesce(status, 'no address') AS status, nullif(detail, '') AS detail,
                   nullif(width, 0)::INTEGER AS width, nullif(height, 0)::INTEGER AS height,
                   nullif(sha256, '') AS sha256
            FROM {parquet_rows(folder.items)} LEFT JOIN images ON image_url = url ORDER BY item""")
        counts = dict(table.aggregate("status, count(*)", "status").order("2 DESC, 1").fetchall())
        publish(folder.image_table, lambda staged: table.write_parquet(utf8_path(staged)), {
            "inputs": {folder.items.name: items["sha256"]}, "items_sha256": items["items_sha256"],
            "num_items": items["num_items"], "command": command,
            "settings": {"min_image_side": options.min_side}, "counts": counts})
    log.info("images: wrote %s (%s)", folder.image_table, _counts_text(counts))


def _fetch(options: ImageFetchOptions, urls: list[str]) -> list[ImageRecord]:
    """Download the missing images, and return one record per URL, in the order of `urls`."""
    folder = options.folder
    for subfolder in folder.images.glob("*/"):
        sweep(subfolder, "*")
    # Every image was checked before it was saved under its name. With --force, all images are checked again.
    existing, recorded, records = _files(folder), {} if options.force else _recorded_files(folder), {}
    for url in urls:
        file = file_name(url)
        if file in existing and file in recorded:
            records[url] = ImageRecord(url, "ok", "", file, *recorded[file])
        elif file in existing:  # a run was stopped before it recorded the file, or --force asks for a check
            try:
                records[url] = _image_record(url, file, (folder.images / file).read_bytes(), options.force)
            except BadImage as error:
                log.warning("images: %s is damaged; downloading it again (%s)", file, error.detail)
    missing = [url for url in urls if url not in records]
    log.info("images: %d of %d images already exist", len(records), len(urls))
    failed = 0
    with Progress("images", len(missing), "images") as progress:
        for url, answer in Fetcher(missing, options.rate).results():
            records[url] = ImageRecord(url, answer.status, answer.detail)
            if answer.status == "fetched":
                try:
                    records[url] = _image_record(url, file_name(url), answer.body, check=True)
                    write_bytes(folder.images / records[url].file, answer.body, clean=False)
                except BadImage as error:
                    records[url] = ImageRecord(url, error.status, error.detail)
            failed += not records[url].file
            progress.update(1, failed=failed)
    return [record if not record.file or min(record.width, record.height) >= options.min_side else
            record._replace(status="placeholder", detail=f"{record.width} x {record.height} pixels")
            for record in map(records.__getitem__, urls)]


def file_name(url: str) -> str:
    """Return the path of the image with this URL, relative to `images/`.

    There may be millions of images, so they are distributed over 256 subfolders.
    """
    name = hashlib.sha256(url.encode("utf-8")).hexdigest()[:32]
    ending = PurePosixPath(urlsplit(url).path).suffix.lower() if host_of(url) else ""
    return f"{name[:2]}/{name}{ending if ending in ENDINGS else ''}"


def _image_record(url: str, file: str, data: bytes, check: bool) -> ImageRecord:
    return ImageRecord(url, "ok", "", file, *image_size(data, check), hashlib.sha256(data).hexdigest())


def _files(folder: DatasetFolder) -> set[str]:
    return {f"{subfolder.name}/{name}" for subfolder in folder.images.glob("??") for name in os.listdir(subfolder)}


def make_command(folder: DatasetFolder) -> str:
    return f"bash dataloader/1_load_figure.sh --dataset {folder.name}{folder.root_flag}"


def load_image_table(folder: DatasetFolder) -> ImageTable:
    """Load images.parquet.

    Raises DataError if the file is missing. Raises ArtifactError if the file is stale or damaged.
    """
    meta = load_meta(folder.image_table, make_command(folder))
    with reading_table(folder.image_table, meta.fix) as connection:
        rows = connection.sql(f"""SELECT raw_id, file, sha256, status = 'ok'
                                  FROM {parquet_rows(folder.image_table)} ORDER BY item""").fetchall()
    items = load_items_meta(folder)
    if ids_sha256(row[0] or "" for row in rows) != items["items_sha256"]:
        raise ArtifactError(folder.image_table, f"does not have the {items['num_items']} items of {folder.items.name}",
                            f"It has {len(rows)} rows", meta.fix)
    for raw_id, *described, present in rows:
        if present and not all(isinstance(value, str) for value in described):
            raise ArtifactError(folder.image_table, f"item {raw_id!r} has an image, but no file or no sha256",
                                fix=meta.fix)
    raw_id, file, sha256, present = (np.array([row[i] for row in rows], dtype=object) for i in range(4))
    return ImageTable(raw_id, file, sha256, present.astype(bool))


def _recorded_files(folder: DatasetFolder) -> dict[str, tuple[int, int, str]]:
    """Return the size and sha256 of each image file that the last run recorded: file -> (width, height, sha256)."""
    try:
        return {row[0]: row[1:] for row in duckdb.sql(f"""SELECT file, width, height, sha256
            FROM {parquet_rows(folder.image_table)} WHERE file IS NOT NULL""").fetchall()}
    except duckdb.Error:  # the table is missing or damaged; the image files are read instead
        return {}


def _counts_text(counts: dict[str, int]) -> str:
    return f"{sum(counts.values())} items: " + ", ".join(f"{count} {status}" for status, count in counts.items())


def refuse_missing(folder: DatasetFolder) -> None:
    """Raise DataError if some items have no image. The error names the first of these items."""
    num_missing, rows = _missing(folder)
    if num_missing:
        raise DataError(folder.image_table, f"{num_missing} items have no image",
                        ", ".join(f"{raw_id} ({status})" for raw_id, status, _ in rows),
                        f"run {make_command(folder)} again, or use --missing_images mask to continue without them")


def _missing(folder: DatasetFolder) -> tuple[int, list[tuple]]:
    """Return the number of items without an image, and (raw id, status, detail) of the first NUM_LISTED of them."""
    meta = load_meta(folder.image_table, make_command(folder))
    counts = meta["counts"]
    with reading_table(folder.image_table, meta.fix) as connection:
        rows = connection.sql(f"""SELECT raw_id, status, detail FROM {parquet_rows(folder.image_table)}
                                  WHERE status <> 'ok' ORDER BY item LIMIT {NUM_LISTED}""").fetchall()
    return sum(counts.values()) - counts.get("ok", 0), rows


if __name__ == "__main__":
    sys.exit(run_command(main))

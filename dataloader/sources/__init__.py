"""One module a raw format, and how a folder of raw files tells which source it is from.

A reader offers `raw_paths(options)`, the files it reads, and `raw_tables(options, paths, work)`, which says of the
interactions, and of the items where there are any, how they are read (`tables.RawTable`).
"""

import json
from itertools import islice
from pathlib import Path

from common.errors import ConfigError, DataError, closest, nearest
from common.publishing import meta_path
from dataloader.sources.lines import numbered_lines
from dataloader.sources.records import NO_RECORD, PARSERS

NUM_FIRST = 100  # lines that are looked at


def find_source(dataset: str, raw_dir: Path | None, interactions: Path | None, configs: dict[str, dict],
                processed: Path) -> str:
    """The source of a data set: from the raw files that are there, from what was `processed`, else from its name.

    Raises ConfigError.
    """
    if interactions is not None:
        return "local"
    if raw_dir is None and (recorded := _recorded_source(processed)) in configs:
        return recorded
    source = None if raw_dir is None else _source_of_files(dataset, raw_dir)
    if source is not None:
        return source
    known = next((name for name, config in configs.items() if dataset in config["datasets"]), None)
    if known is not None:
        return known
    if raw_dir is not None:
        raise ConfigError(f"--raw_dir {raw_dir}", f"holds nothing that tells where {dataset} is from",
                          "looked for the files of Amazon, MovieLens and RecBole, and for interactions.*",
                          "name the --source, or the files with --interactions FILE --items FILE")
    names = sorted({d for config in configs.values() for d in config["datasets"]})
    close = closest(dataset, names)
    raise ConfigError(f"--dataset {dataset}", "no source has such a data set", nearest(dataset, names),
                      f"--dataset {close}" if close else
                      "correct the name, or --raw_dir DIR for files of your own")


def _recorded_source(processed: Path) -> str | None:
    try:
        return json.loads(meta_path(processed).read_text(encoding="utf-8"))["settings"]["source"]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or the next reader will say what is wrong with it
        return None


def _source_of_files(dataset: str, raw: Path) -> str | None:
    if any(raw.glob("interactions.*")) or (raw / f"{dataset}.inter").exists():
        return "local"
    if (raw / f"{dataset}.jsonl.gz").exists():
        return "amazon23"
    if dataset.startswith("ml-") and ((raw / f"{dataset}.zip").exists() or any(raw.glob("recbole-*.whl"))):
        return "movielens"
    # The reviews of 2014 and 2018 look alike; their metadata do not.
    metadata = raw / f"meta_{dataset}.json.gz"
    return _year_of(metadata) if metadata.exists() else None


def _year_of(metadata: Path) -> str | None:
    """From the first line that is a record: the literals of 2014 are no JSON."""
    year = None
    try:
        for _number, line in islice(numbered_lines(metadata), NUM_FIRST):
            year = "amazon14"  # if none is a record, the reader will say what is wrong with the first
            for lines, source in (("json", "amazon18"), ("python", "amazon14")):
                try:
                    PARSERS[lines](line)
                    return source
                except NO_RECORD:
                    continue
    except (OSError, DataError):  # the reader will say what is wrong with the file
        pass
    return year

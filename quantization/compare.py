"""All finished tokenizers of a data set in one table."""

import logging
from pathlib import Path

from common.artifacts import DatasetFolder, load_meta
from common.cli import ROOT, folder_flag
from common.errors import ArtifactError, DataError, UserError
from common.publishing import write_text
from common.run import latest_run, read_finished
from common.tables import csv_text, markdown

log = logging.getLogger(__name__)

COLUMNS = ("tokenizer", "seed", "codes", "collisions", "after", "largest bucket", "least used level", "perplexity",
           "Gini", "variance kept", "alike (1 code)", "alike (2 codes)", "behaviour")
NOTES = ("codes: levels x codebook size, + codes that disambiguate. collisions: 1 - distinct IDs / items, before "
         "disambiguation; after: behind it. least used level: share of its codes in use. perplexity, Gini: means over "
         "the levels. variance kept: of the embeddings, by reconstruction. alike: similarity of the texts of items "
         "that share so many codes, over random pairs. behaviour: how often users go on to an item of the same first "
         "code, over chance (training split).")


def compare(folder: DatasetFolder, run_root: Path) -> str:
    """The table as text, which is also written as Markdown and CSV into `run_root/quantization/<D>/` if possible.

    Tokenizers of other inputs than the dataset's present ones are counted and left out: they code other items, or were
    measured by other events. Raises DataError if no tokenizer is left.
    """
    parent = run_root / "quantization" / folder.name
    runs = {path.name: run for path in sorted(parent.glob("*/")) if (run := latest_run(path)) is not None}
    found = _readable(runs)
    summaries = {name: summary for name, summary in found.items() if _is_of(summary.get("inputs", {}), folder)}
    if not summaries:
        root = folder.root_flag + folder_flag("--run_root", run_root, ROOT / "runs")
        raise DataError(parent, "has no finished tokenizer" + (" of the present inputs" if found else ""),
                        fix=f"python quantization/main.py --dataset_name {folder.name}{root}")
    best_first = sorted(summaries, key=lambda name: summaries[name]["metrics"]["collision_rate"])
    rows = [row(name, runs[name], summaries[name]) for name in best_first]
    table = markdown(COLUMNS, rows)
    left_out = len(found) - len(rows)
    notes = f"{NOTES}\n\n{left_out} tokenizers of earlier inputs are left out." if left_out else NOTES
    try:
        write_text(parent / "compare.md", f"# Tokenizers of {folder.name}\n\n{table}\n\n{notes}\n")
        write_text(parent / "compare.csv", csv_text(COLUMNS, rows))
        written = f"wrote {parent / 'compare.md'} and .csv"
    except OSError as error:
        written = f"{parent / 'compare.md'} and .csv could not be written: {error.strerror}"
    return f"{folder.name}: {len(rows)} tokenizers\n\n{table}\n\n{notes}\n{written}"


def _readable(runs: dict[str, Path]) -> dict[str, dict]:
    """The summaries of all runs that can be read; a warning names each of the others."""
    summaries = {}
    for name, run in runs.items():
        try:
            summaries[name] = read_finished(run, "run the quantizer again with --force")
        except ArtifactError as error:
            log.warning("left out: %s", error)
    return summaries


def _is_of(recorded: dict[str, str], folder: DatasetFolder) -> bool:
    """Whether a run has read the artifacts that are there now, and was measured by them.

    `recorded` are hashes by file name. A file from outside the dataset, such as imported IDs, may have moved since.
    """
    names = {name for name in recorded if name in (folder.interactions.name, folder.items.name)
             or name.startswith(f"{folder.name}.emb-")}
    # Judge (quantization/evaluate.py) reads these two; importing it would load torch.
    names |= {path.name for path in (folder.interactions, folder.embeddings("td")) if path.exists()}
    return all(_sha256(folder.path / name) == recorded.get(name) for name in names)


def _sha256(path: Path) -> str | None:
    try:
        return load_meta(path, "")["sha256"]
    except UserError:  # missing, or stale
        return None


def row(name: str, run: Path, summary: dict) -> list[str]:
    """One tokenizer's cells, from what its run wrote down; empty where an earlier version did not measure it."""
    metrics, sizes = summary["metrics"], summary["codebook_sizes"]
    alike, used = metrics.get("prefix_coherence", []), metrics["utilization"]
    return [name, _seed(run), shape(sizes, len(used)), f"{metrics['collision_rate']:.2%}",
            _cell(summary.get("collision_rate_after"), ".2%"), str(metrics["largest_bucket"]), f"{min(used):.0%}",
            f"{_mean(metrics['perplexity']):.0f}", _cell(_mean(metrics.get("gini")), ".2f"),
            _cell(metrics.get("explained_variance"), ".0%"), _cell(alike[0] if alike else None, ".1f"),
            _cell(alike[1] if len(alike) > 1 else None, ".1f"), _cell(metrics.get("behavioural_coherence"), ".1f")]


def shape(sizes: list[int], num_levels: int) -> str:
    """`3 x 256 + 10`: three codebooks of 256 codewords, and 10 codes that disambiguate."""
    levels, extra = sizes[:num_levels], sizes[num_levels:]
    text = f"{len(levels)} x {levels[0]}" if len(set(levels)) == 1 else " x ".join(map(str, levels))
    return " + ".join([text, *map(str, extra)])


def _seed(run: Path) -> str:
    import yaml

    return str(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["common"]["seed"])


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

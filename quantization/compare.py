"""A table that compares the tokenizers (trained quantizers) of a dataset."""

from pathlib import Path

from common.artifacts import DatasetFolder, dataset_line, load_meta
from common.cli import ROOT, folder_flag
from common.errors import ArtifactError, DataError, UserError
from common.reading import AMOUNT, COUNT, SHARE, WHY, Record
from common.run import latest_run, read_config, read_finished, read_runs, save_comparison
from common.tables import csv_text, markdown

COLUMNS = ("tokenizer", "seed", "codes", "collisions", "collisions left", "largest bucket", "lowest utilization",
           "perplexity", "Gini", "explained variance", "coherence (1 code)", "coherence (2 codes)",
           "behavioral coherence")
NOTES = ("codes: levels x codebook size + codes of the disambiguation level. collisions: 1 - distinct IDs / items, "
         "before disambiguation. collisions left: the same after disambiguation. largest bucket: number of items with "
         "the most frequent ID. lowest utilization: share of codes in use, for the level with the lowest share. "
         "perplexity, Gini: means over the levels. explained variance: share of the embeddings' variance that the "
         "reconstruction explains. coherence: text similarity of items that share the first 1 or 2 codes / text "
         "similarity of random pairs. behavioral coherence: how often consecutive items of a user share the first "
         "code / how often this happens by chance (training split).")
FIX = "run the quantizer again with --force"
# The metrics in finished.json that the table needs, and their types.
METRICS = {"collision_rate": SHARE, "largest_bucket": COUNT, "utilization": list[SHARE], "perplexity": list[AMOUNT]}
OPTIONAL_METRICS = {"gini": list[float], "explained_variance": float | None, "prefix_coherence": list[float | None],
                    "behavioral_coherence": float | None}


def compare(folder: DatasetFolder, run_root: Path) -> str:
    """Return the comparison table as text, and write it to compare.md and compare.csv.

    The files are in the folder `run_root/quantization/<dataset>/`. If they cannot be written, the returned text says
    so. If a tokenizer belongs to an earlier version of the dataset's files, the table does not show it. Raises
    DataError if there is no tokenizer to show.
    """
    parent = run_root / "quantization" / folder.name
    runs = {path.name: run for path in sorted(parent.glob("*/")) if (run := latest_run(path)) is not None}
    readable = read_runs(runs.values(), _read)
    summaries = {name: readable[run] for name, run in runs.items()
                 if run in readable and _is_current(readable[run]["inputs"], folder)}
    if not summaries:
        root = folder.root_flag + folder_flag("--run_root", run_root, ROOT / "runs")
        raise DataError(parent, "has no finished run" + (" for the current dataset files" if readable else ""),
                        fix=f"python quantization/main.py --dataset_name {folder.name}{root}")
    best_first = sorted(summaries, key=lambda name: summaries[name]["metrics"]["collision_rate"])
    rows = [row(name, summaries[name]) for name in best_first]
    about, table = dataset_line(folder), markdown(COLUMNS, rows)
    num_skipped = len(readable) - len(rows)
    notes = (f"{NOTES}\n\nNot shown: {num_skipped} tokenizers of earlier versions of the dataset's files."
             if num_skipped else NOTES)
    written = save_comparison(parent, f"# Tokenizers of {folder.name}\n\n{about}\n\n{table}\n\n{notes}",
                              csv_text(COLUMNS, rows))
    return f"{folder.name}: {len(rows)} tokenizers\n{about}\n\n{table}\n\n{notes}\n{written}"


def _is_current(recorded: dict[str, str], folder: DatasetFolder) -> bool:
    """Return whether a run was trained and evaluated on the current files of the dataset.

    recorded: name -> hash of each input file of the run
    """
    # Files outside the dataset, such as imported IDs, are not checked, because they may have been moved.
    names = {name for name in recorded if name in (folder.interactions.name, folder.items.name)
             or name.startswith(f"{folder.name}.emb-")}
    # The files that `EvaluationData` reads. Its module is not imported here, because it imports torch, which is slow.
    names |= {path.name for path in (folder.interactions, folder.embeddings("td")) if path.exists()}
    return all(_sha256(folder.path / name) == recorded.get(name) for name in names)


def _sha256(path: Path) -> str | None:
    try:
        return load_meta(path, "")["sha256"]
    except UserError:  # missing or stale
        return None


def _read(run: Path) -> Record:
    """Return the content of finished.json, and the seed. Raises ArtifactError if a value that the table needs is wrong.
    """
    summary = read_finished(run, FIX)
    metrics = Record(summary["metrics"], summary.path, summary.fix)
    metrics.check(METRICS, OPTIONAL_METRICS)
    for key in ("utilization", "perplexity"):  # the codebook sizes may include a disambiguation level
        if not 0 < len(metrics[key]) <= len(summary["codebook_sizes"]):
            raise ArtifactError(summary.path, f"{key} must have one value per level, got {metrics[key]}", WHY,
                                summary.fix)
    return Record(summary | {"seed": read_config(run, summary.fix)["common"]["seed"]}, summary.path, summary.fix)


def row(name: str, summary: dict) -> list[str]:
    """Return the table row of one tokenizer. A cell is empty if the run did not record the metric."""
    metrics, sizes = summary["metrics"], summary["codebook_sizes"]
    coherence, used = metrics.get("prefix_coherence", []), metrics["utilization"]
    return [name, str(summary["seed"]), shape(sizes, len(used)), f"{metrics['collision_rate']:.2%}",
            _cell(summary.get("collision_rate_after"), ".2%"), str(metrics["largest_bucket"]), f"{min(used):.0%}",
            f"{_mean(metrics['perplexity']):.0f}", _cell(_mean(metrics.get("gini")), ".2f"),
            _cell(metrics.get("explained_variance"), ".0%"), _cell(coherence[0] if coherence else None, ".1f"),
            _cell(coherence[1] if len(coherence) > 1 else None, ".1f"),
            _cell(metrics.get("behavioral_coherence"), ".1f")]


def shape(sizes: list[int], num_levels: int) -> str:
    """Return the codebook sizes as text, for example `3 x 256 + 10`.

    The example has three levels of 256 codes, and a disambiguation level of 10 codes.
    """
    levels, extra = sizes[:num_levels], sizes[num_levels:]
    text = f"{len(levels)} x {levels[0]}" if len(set(levels)) == 1 else " x ".join(map(str, levels))
    return " + ".join([text, *map(str, extra)])


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _cell(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)

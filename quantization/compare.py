"""All finished tokenizers of a data set in one table."""

import csv
import io
from pathlib import Path

from common.artifacts import DatasetFolder, write_text
from common.errors import DataError
from common.run import latest_run, read_json

COLUMNS = ("tokenizer", "seed", "levels", "collisions", "after", "largest bucket", "least used level", "perplexity",
           "Gini", "variance kept", "alike (1 code)", "alike (2 codes)", "behaviour")
NOTES = ("collisions: 1 - distinct IDs / items, before and after disambiguation. least used level: share of its codes "
         "in use. perplexity and Gini: means over the levels. variance kept: of the embeddings, by reconstruction. "
         "alike: similarity of the texts of items that share so many codes, over random pairs. behaviour: how often "
         "users go on to an item of the same first code, over chance (training split).")


def compare(folder: DatasetFolder, run_root: Path) -> str:
    """The table as text, which is also written as Markdown and CSV into `run_root/quantization/<D>/`."""
    parent = run_root / "quantization" / folder.name
    runs = {path.name: run for path in sorted(parent.glob("*/")) if (run := latest_run(path)) is not None}
    if not runs:
        raise DataError(parent, "has no finished tokenizer", fix=f"python quantization/main.py --dataset_name "
                        f"{folder.name}{folder.root_flag}")
    rows = [row(name, run) for name, run in runs.items()]
    rows.sort(key=lambda cells: (cells[3] == "", cells[3]))
    markdown = f"# Tokenizers of {folder.name}\n\n{table(rows)}\n\n{NOTES}\n"
    write_text(parent / "compare.md", markdown)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([COLUMNS, *rows])
    write_text(parent / "compare.csv", buffer.getvalue())
    return f"{folder.name}: {len(rows)} tokenizers\n\n{table(rows)}\n\n{NOTES}\nwrote {parent / 'compare.md'} and .csv"


def row(name: str, run: Path) -> list[str]:
    """One tokenizer's cells, from what its run wrote down."""
    summary = read_json(run / "finished.json", "run the quantizer again with --force")
    figures = summary["figures"]
    sizes, alike = summary["codebook_sizes"], figures.get("prefix_coherence", [])
    return [name, _seed(run), " x ".join(map(str, sizes)), f"{summary['collision_rate_before']:.2%}",
            f"{summary['collision_rate_after']:.2%}", str(figures["largest_bucket"]),
            f"{min(figures['utilization']):.0%}", f"{_mean(figures['perplexity']):.0f}", f"{_mean(figures['gini']):.2f}",
            _cell(figures.get("explained_variance"), ".0%"), _cell(alike[0] if alike else None, ".1f"),
            _cell(alike[1] if len(alike) > 1 else None, ".1f"), _cell(figures.get("behavioural_coherence"), ".1f")]


def table(rows: list[list[str]]) -> str:
    """Markdown that is aligned for reading as text, too."""
    widths = [max(len(line[i]) for line in [list(COLUMNS), *rows]) for i in range(len(COLUMNS))]
    lines = [[heading.ljust(width) for heading, width in zip(COLUMNS, widths, strict=True)],
             ["-" * width for width in widths],
             *([cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] for cells in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _seed(run: Path) -> str:
    import yaml

    return str(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["common"]["seed"])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

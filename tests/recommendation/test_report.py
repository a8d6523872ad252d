"""The table of results by hand."""

from recommendation.report import table


def metrics_json(*figures: tuple[float, float]) -> dict:
    """Mean and standard error of the four columns."""
    names = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
    test = {"recall@20": 0.9, "recall@20_stderr": 0.9, "num_targets": 7}
    for name, (mean, error) in zip(names, figures, strict=True):
        test |= {name: mean, f"{name}_stderr": error}
    return {"test": test, "valid": dict.fromkeys(test, 0.5)}


def test_the_table_by_hand():
    rows = {
        "markov": metrics_json((0.01234, 0.001), (0.5, 0.00126), (1.0, 0.0), (0.0, 0.0)),
        "encoder_decoder": metrics_json((0.2, 0.03), (0.1, 0.02), (0.4, 0.01), (0.3, 0.04)),
    }
    assert table(rows) == """\
| model           | recall@5         | ndcg@5           | recall@10        | ndcg@10          |
|-----------------|------------------|------------------|------------------|------------------|
| markov          | 0.0123 (±0.0010) | 0.5000 (±0.0013) | 1.0000 (±0.0000) | 0.0000 (±0.0000) |
| encoder_decoder | 0.2000 (±0.0300) | 0.1000 (±0.0200) | 0.4000 (±0.0100) | 0.3000 (±0.0400) |"""


def test_short_names_get_a_column_as_wide_as_its_heading():
    first, _, row = table({"bpr": metrics_json(*[(0.0, 0.0)] * 4)}).splitlines()
    assert first.startswith("| model | ")
    assert row.startswith("| bpr   | ")

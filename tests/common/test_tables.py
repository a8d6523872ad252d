from pathlib import Path

import duckdb
import pytest

from common.tables import parquet_rows


@pytest.mark.parametrize("name", ["fold[12]", "fold*", "fold?", "[", "[!f]", "v=7", "it's", "~", "**"])
def test_a_path_is_no_pattern(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder, value in (("fold1", 1), ("fold2", 2), (name, 3)):
        Path(folder).mkdir()
        duckdb.sql(f"SELECT {value} AS v").write_parquet(str(tmp_path / folder / "table.parquet"))
    assert duckdb.sql(f"FROM {parquet_rows(Path(name) / 'table.parquet')}").fetchall() == [(3,)]

"""A whole job without a network."""

from common.errors import ResourceError
from tests.end_to_end.conftest import copy_program

NO_SERVER = "http://127.0.0.1:9"  # no server answers there


def test_without_network_one_error_lists_all_addresses(tmp_path):
    tree = copy_program(tmp_path / "program")
    outcome = tree.command("bash", "run_pipeline.sh", "--dataset", "Beauty", "--mirror", NO_SERVER,
                           http_proxy=NO_SERVER, https_proxy=NO_SERVER)
    outcome.check_error(ResourceError, "Beauty", names=[f"{NO_SERVER}/reviews_Beauty_5.json.gz", "snap.stanford.edu"],
                        fix=["--mirror", "--raw_dir"])
    assert not (tree.root / "data/Beauty/interactions.parquet").exists()

import common  # noqa: F401 (it sets how torch's threads wait, and must do so before torch is loaded)

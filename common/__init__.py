"""Code that all stages share: artifacts, configuration, run folders, checkpoints, training loop, errors."""

import os

# Limit how long the threads of PyTorch spin while they wait for each other. If another process needs the same core,
# long spinning delays whole steps (a quantizer trained at 1/16 of its speed); if the cores are free, the short spin
# costs 5 %. OpenMP reads the variables when it is loaded, so set them before torch is imported. Values that the user
# has set are kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

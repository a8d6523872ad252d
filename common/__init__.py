"""Code that all stages share: artifacts, configuration, run folders, checkpoints, the training loop and errors."""

import os

# Limit how long the threads of PyTorch spin while they wait for each other. A thread that spins for long keeps a core
# that another process may need; a quantizer then trained at 1/16 of its normal speed. If the cores are free, training
# with short spins is 5 % slower. OpenMP reads the variables when it is loaded, so set them before torch is imported.
# If the user has set one of the variables, keep the user's value.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

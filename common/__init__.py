"""Code that all stages share: artifacts, configuration, run folders, checkpoints, the training loop and errors."""

import os

# PyTorch's threads spin (wait in a busy loop) for each other. Limit the time, because a spinning thread keeps a core
# that another process may need: a quantizer then trained at 1/16 of its normal speed. If the cores are free, training
# with short spins is 5 % slower. Set the variable before torch is imported, because OpenMP reads it at its start.
# Values that the user has set are kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

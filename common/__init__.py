"""Code that all stages share: artifacts, configuration, run folders, checkpoints, the training loop and errors."""

import os

# PyTorch's threads spin (wait in a busy loop) for each other. Limit the time, because a spinning thread keeps a core
# that another process may need: a quantizer then trained at 1/16 of its normal speed. If the cores are free, training
# with short spins is 5 % slower. Set the variable before torch is imported, because OpenMP reads it at its start.
# Values that the user has set are kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# PyTorch 2.13 and newer compile some operations on a GPU at their first use, for example products of single columns.
# Without a compiler or the headers of Python, this ends the training (pytorch issue 196977).
os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")

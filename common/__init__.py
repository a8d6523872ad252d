"""What every stage needs: artifacts, configuration, run folders, checkpoints, errors."""

import os

# Before torch is loaded: its threads shall not spin for long while they wait for one another. On a core that another
# process needs as well, spinning holds up whole steps (a quantizer trained at a sixteenth of its speed); a short
# spin costs 5 % where the cores are free. Whoever has set one of the two keeps it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

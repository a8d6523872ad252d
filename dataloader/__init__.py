"""Data stage: converts raw reviews and item metadata to clean interactions, item texts and embeddings."""

import sys

if sys.argv[:1] == ["-m"]:  # a command of this stage, such as `python -m dataloader.process`, begins with its imports
    from common.command import report_failed_imports

    report_failed_imports()

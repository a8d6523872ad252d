"""What every stage needs: artifacts, configuration, run folders, checkpoints, errors."""

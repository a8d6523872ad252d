"""The recommendation stage: recommenders, their training and evaluation, and the results."""

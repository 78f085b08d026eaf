"""Training: settings, batches, checkpoints, processes, evaluation, records of runs."""

"""Training: settings, batches, checkpoints, processes, evaluation, telemetry."""

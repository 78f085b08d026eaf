"""What the scripts share: configuration, data, checkpoints, processes, telemetry."""

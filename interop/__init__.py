"""Models in and out: other projects' checkpoints, Hugging Face folders, lm-evaluation-harness."""

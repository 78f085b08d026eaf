"""Scripts that measure and compare finished runs: `python -m analysis.NAME out/a out/b ...`."""

"""Experiments that produce the tables and figures of results/."""

"""Presents benchmark results and traces: tables, plots, the figures in docs, and what changed between two runs."""

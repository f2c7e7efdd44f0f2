"""Presents benchmark results and traces: tables, plots, README's section, and what changed between two runs."""

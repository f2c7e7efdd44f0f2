"""Tools of those who work on the kernels: budgets of compiled kernels, tuning, times. They are not installed.

Run them from the folder kernels/: `python -m tools.budget`, `python -m tools.tune`.
"""

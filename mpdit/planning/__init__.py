"""Predicts what a model and a run cost, before anything is built: FLOPs, parameters, memory, time."""

from mpdit.planning.account import Account, account

__all__ = ["Account", "account"]

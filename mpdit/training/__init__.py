"""Trains a model: cli (entry) calls setup (everything is checked), then loop (one function).

Nothing is imported here: a rank answers to signals (stop) before it loads torch, which takes seconds.
"""

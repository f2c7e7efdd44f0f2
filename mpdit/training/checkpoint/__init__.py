"""Commits, finds, verifies and restores checkpoints."""

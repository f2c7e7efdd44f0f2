"""Helpers that every other package here uses: errors, files, locks, progress, ranks, random numbers."""

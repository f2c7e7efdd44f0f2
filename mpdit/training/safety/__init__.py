"""Keeps a run safe: bad steps are skipped, signals and lost launchers stop it, hung ranks end."""

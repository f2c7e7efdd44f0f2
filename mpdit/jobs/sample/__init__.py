"""Draws sample sets: many images, by any number of processes, into a folder that is continued where it was."""

"""Reads and writes models in other projects' forms: official checkpoints, diffusers pipelines, the hub."""

"""Readers of other projects' formats, which read latents where they lie and write nothing beside them."""

"""Extracts packed latents from images: listed, decoded ahead, encoded, in parts that any number of ranks share."""

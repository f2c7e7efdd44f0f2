"""From images to packed latents: listed, cropped, decoded ahead, encoded, in parts that any number of ranks share."""

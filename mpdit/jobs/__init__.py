"""Does long work on many GPUs beside training, each restartable: extracting latents, drawing samples, evaluating."""

"""The model: stages of transformer blocks, coarse to fine (mpdit.py), their settings, their weights and the VAE."""

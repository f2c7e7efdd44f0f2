"""The model: read mpdit.py first; layers.py, time.py and transition.py are its parts, config.py describes it.

packed.py is the model on several sizes in one batch; weights.py and pretrained.py are its files and the hub; vae.py
stands between pixels and latents.
"""

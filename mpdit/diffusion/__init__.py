"""Flow matching: flow.py is the loss, sampling.py the samplers, inference.py the model as they run it."""

"""Training: one command line (config), everything checked first (prepare), one loop (loop).

Nothing is imported here: a rank answers to signals (stop) before it loads torch, which takes seconds.
"""

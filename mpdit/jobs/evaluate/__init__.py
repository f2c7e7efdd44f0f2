"""Measures how good samples are; every figure comes with the protocol it was measured by."""

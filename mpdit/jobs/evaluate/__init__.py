"""How good are the samples? Every figure comes with the protocol it was measured by."""

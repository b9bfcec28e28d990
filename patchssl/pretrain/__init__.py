"""Pretraining: views, patch-wise color, matching losses, the engine."""

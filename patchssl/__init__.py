"""Patch-wise self-supervised pretraining of Vision Transformers, and the benchmarks that judge them."""

__version__ = "0.1.0"

"""The life of a pretraining run: start, loop, checkpoints, resume, log."""

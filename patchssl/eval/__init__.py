"""Evaluation of any backbone under named protocols."""

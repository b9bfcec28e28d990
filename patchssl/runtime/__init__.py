"""Processes, devices, console, signals, files: knows no image and no network."""

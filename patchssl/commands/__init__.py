"""The groups of commands that patchssl.cli joins, one module each; nothing heavy is imported before one runs."""

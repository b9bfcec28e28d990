"""The public sets on the disk: get, check, make."""

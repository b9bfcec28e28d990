"""Tables and figures made from result records."""

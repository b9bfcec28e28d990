"""Tables made of result records, and their statistics."""

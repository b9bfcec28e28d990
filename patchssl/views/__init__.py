"""What a network sees of an image: crops and their geometry, matching, color, masks; pure functions."""

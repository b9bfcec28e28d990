"""A study: variants of one recipe, each with the same seeds, pretrained and scored alike, and their comparison."""

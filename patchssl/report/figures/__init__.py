"""From a MODEL and images to a figure."""

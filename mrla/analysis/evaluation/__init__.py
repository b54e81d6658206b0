"""A trained network and images: scores, predictions, exported files."""

"""Training runs: from a recipe to trained weights, metrics and a curve."""

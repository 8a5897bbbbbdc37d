"""How good a model is, and pages and pictures that show it."""

"""The model, its settings and its training, in one process or several."""

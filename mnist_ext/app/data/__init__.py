"""Data sets, MNIST's file format, and image files as MNIST's images.

The names of the data sets are here: --help needs them, without torch.
"""

DATASETS = ("auto", "mnist", "fashion-mnist", "digits")

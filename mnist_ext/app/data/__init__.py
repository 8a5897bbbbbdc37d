"""Data sets, MNIST's file format, and image files as MNIST's images."""

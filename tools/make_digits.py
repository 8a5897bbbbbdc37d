"""Rebuild mnist_ext/app/data/digits.npz from scikit-learn's digits.csv.gz.

The csv is sklearn/datasets/data/digits.csv.gz in any scikit-learn wheel or source archive. Each
row holds the 64 pixels of an 8x8 image, from 0 to 16, and the label.

    python tools/make_digits.py digits.csv.gz mnist_ext/app/data/digits.npz
"""

import argparse
from pathlib import Path

import numpy as np


def main() -> None:
    """Read the csv, put its rows in a fixed random order and write them as uint8 arrays."""
    parser = argparse.ArgumentParser(description="Rebuild the embedded digits.")
    parser.add_argument("csv", type=Path, help="digits.csv.gz from scikit-learn")
    parser.add_argument("npz", type=Path, help="the file to write")
    args = parser.parse_args()

    table = np.loadtxt(args.csv, delimiter=",", dtype=np.uint8)
    if table.shape != (1797, 65):
        parser.error(f"{args.csv} has the shape {table.shape}, expected (1797, 65)")
    # Shuffled here rather than when loading, so that the split into training and test set does
    # not depend on a library's version. NumPy promises that RandomState's numbers never change.
    table = table[np.random.RandomState(0).permutation(len(table))]
    np.savez_compressed(args.npz, images=table[:, :64].reshape(-1, 8, 8), labels=table[:, 64])


if __name__ == "__main__":
    main()

"""Put the pictures of a run onto one sheet, for the README.

    python tools/run_picture.py RUN docs/run.png

RUN is a folder that `mnist-ext train` has written and `mnist-ext eval --plots` has drawn.
"""

import argparse
from pathlib import Path

from PIL import Image

GAP = 24


def main() -> None:
    """Compose and write."""
    parser = argparse.ArgumentParser(description="Put the pictures of a run onto one sheet.")
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()

    curves, confusion, mistakes = (
        Image.open(args.run / f"{name}.png").convert("RGB")
        for name in ("curves", "confusion", "mistakes")
    )
    width = curves.width
    mistakes = mistakes.resize((width, round(mistakes.height * width / mistakes.width)))
    height = curves.height + GAP + mistakes.height
    confusion = confusion.resize((round(confusion.width * height / confusion.height), height))
    sheet = Image.new("RGB", (width + GAP + confusion.width, height), "white")
    sheet.paste(curves, (0, 0))
    sheet.paste(mistakes, (0, curves.height + GAP))
    sheet.paste(confusion, (width + GAP, 0))
    # So many colours are enough for it, in a third of the bytes.
    sheet.quantize(256, Image.Quantize.MAXCOVERAGE).save(args.output, optimize=True)
    print(f"{args.output}: {sheet.width}x{sheet.height}, {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

"""What `mnist-ext predict` makes of photo-like pictures of MNIST's test digits, kind by kind.

python benchmarks/photos.py RUN [--quick] [--count 300] [--first 1000] [--kinds KIND ...]

The finding of digits was tuned on seeds below 1000, which draw other digits too; the table is of
seeds from 1000 on. A picture is right if the whole number is; a blank one if no digit is found.
"""

import argparse

from photo_kinds import KINDS, count, draw
from provenance import describe

from mnist_ext.app.cli.commands.predict import classify
from mnist_ext.app.data import datasets
from mnist_ext.app.data.images import NothingFoundError, prepare
from mnist_ext.app.runs import trained

# Percent, from issue 22; a kind that it does not name has none.
BARS = dict.fromkeys(["scan", "scan turned", "photo", "small", "cropped"], 98.5)
BARS |= {"dim": 95, "pencil": 95, "shadow": 96, "lined": 92, "squared": 88, "specks": 96}
BARS |= {"desk": 93, "glare": 88} | {f"numbers of {n}": 92 for n in (2, 3, 4)}
BARS |= dict.fromkeys(["blank", "blank lined", "blank shadow"], 97)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_folder", metavar="RUN")
    parser.add_argument("--count", type=int, default=300, help="pictures a kind (default: 300)")
    parser.add_argument("--quick", action="store_true", help="30 pictures a kind")
    parser.add_argument("--first", type=int, default=1000, help="first seed (default: 1000)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--data-dir", help="folder that holds MNIST/raw")
    args = parser.parse_args()
    pictures = 30 if args.quick else args.count

    print(describe())
    model = trained.load(args.run_folder)
    test = datasets.load("mnist", args.data_dir).test
    print(f"{'kind':14}  right %  bar %  nothing found %  wrong, > 90 % sure %")
    all_sure = 0
    for kind in args.kinds:
        right = nothing = sure = 0
        for seed in range(args.first, args.first + pictures):
            chosen = [(4 * seed + i) % len(test) for i in range(count(kind))]
            truth = "".join(str(int(test.labels[i])) for i in chosen)
            try:
                prepared = prepare(draw(kind, seed, test.images[chosen].numpy()))
                digits = classify(model, prepared)
            except NothingFoundError:
                digits = []
            is_right = "".join(digit["name"] for digit in digits) == truth
            right += is_right
            nothing += not digits
            # As the number is: every digit of it.
            least = min((digit["probability"] for digit in digits), default=0)
            sure += not is_right and least > 0.9
        all_sure += sure
        shares = (100 * n / pictures for n in (right, nothing, sure))
        print(
            "{:14}  {:7.1f}  {:5}  {:15.1f}  {:20.1f}".format(
                kind, next(shares), BARS[kind], *shares
            ),
            flush=True,
        )
    total = pictures * len(args.kinds)
    print(f"wrong, > 90 % sure: {all_sure} of {total}, {100 * all_sure / total:.2f} %; bar 1 %")


if __name__ == "__main__":
    main()

"""The data sets: where they are found, how damage is reported, and the batches made of them."""

import gzip
import hashlib
import os
import socket
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from idx_files import FILES, TEST_SIZE, TRAIN_SIZE, idx_bytes, write_mnist
from run_folders import config_of, names_in
from torchvision.datasets import MNIST

from mnist_ext.app import UserError
from mnist_ext.app.cli.main import main
from mnist_ext.app.data import datasets
from mnist_ext.app.data.datasets import DownloadError, Split, batches, find, load, normalize

MNIST_FOLDER = os.environ.get("MNIST_EXT_DATA")


@pytest.fixture(autouse=True)
def unreachable(isolated, monkeypatch):
    """Refuse downloads at once."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])


class TestDigits:
    def test_shapes_and_types(self):
        with pytest.raises(UserError, match="unknown data set 'cifar'"):
            load("cifar")
        digits = load("digits")
        assert (len(digits.train), len(digits.test)) == (1437, 360)
        assert digits.notice is None
        for split in (digits.train, digits.test):
            assert split.images.shape == (len(split), 28, 28)
            assert split.images.dtype == torch.uint8
            assert split.labels.dtype == torch.int64
            assert split.labels.unique().tolist() == list(range(10))

    def test_a_digit_fills_the_middle_20x20_pixels(self):
        brightest = load("digits").train.images.amax(dim=0)
        assert brightest.max() == 255
        middle = brightest[4:24, 4:24].clone()
        brightest[4:24, 4:24] = 0
        assert (brightest == 0).all()
        assert (middle[[0, -1]] > 0).any(dim=1).all()

    def test_labels_belong_to_their_images(self):
        digits = load("digits")
        train, test = digits.train.images.flatten(1).float(), digits.test.images.flatten(1).float()
        means = torch.stack([train[digits.train.labels == label].mean(0) for label in range(10)])
        nearest = torch.cdist(test, means).argmin(dim=1)
        assert (nearest == digits.test.labels).float().mean() > 0.85
        # No test image is in the training set.
        assert torch.cdist(test.double(), train.double()).min() > 1


class TestNormalize:
    def test_formula(self):
        images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
        result = normalize(images, mean=0.25, std=0.5)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, (images / 255 - 0.25) / 0.5)

    def test_mean_and_std_are_those_of_the_training_images(self):
        digits = load("digits")
        pixels = normalize(digits.train.images, digits.mean, digits.std).double()
        assert pixels.mean().item() == pytest.approx(0, abs=1e-5)
        assert pixels.std(correction=0).item() == pytest.approx(1, abs=1e-5)


class TestBatches:
    # The pixels of an image all equal its label.
    LABELS = torch.arange(100)
    SPLIT = Split(LABELS.to(torch.uint8).view(-1, 1, 1).repeat(1, 28, 28), LABELS)

    @pytest.mark.parametrize("shuffled", [False, True])
    def test_every_image_once_with_its_label(self, shuffled):
        generator = torch.Generator().manual_seed(0) if shuffled else None
        result = list(batches(self.SPLIT, 32, 0, 1 / 255, generator))
        assert [images.shape for images, _ in result] == [(n, 1, 28, 28) for n in (32, 32, 32, 4)]
        for images, labels in result:
            assert images.dtype == torch.float32
            assert images.is_contiguous()
            expected = labels.view(-1, 1, 1, 1).expand(images.shape).float()
            torch.testing.assert_close(images, expected)
        seen = torch.cat([labels for _, labels in result])
        assert torch.equal(seen.sort().values, self.LABELS)
        assert torch.equal(seen, self.LABELS) is not shuffled

    def test_a_seed_determines_the_order_which_differs_from_pass_to_pass(self):
        def orders(seed: int) -> list[list[int]]:
            generator = torch.Generator().manual_seed(seed)
            passes = [batches(self.SPLIT, 32, 0, 1, generator) for _ in range(2)]
            return [torch.cat([labels for _, labels in p]).tolist() for p in passes]

        first, second = orders(seed=1)
        assert orders(seed=1) == [first, second]
        assert first != second
        assert orders(seed=2)[0] != first


class TestSearch:
    def test_order_of_the_folders(self, tmp_path, monkeypatch):
        given, configured = tmp_path / "given", tmp_path / "configured"
        cache = tmp_path / "cache" / "mnist_ext"
        monkeypatch.setenv("MNIST_EXT_DATA", str(configured))
        assert find("mnist", given) is None
        for root in (cache, configured, given):
            write_mnist(root)
            assert find("mnist", given) == root

    @pytest.mark.parametrize(
        ("name", "folder"),
        [("auto", "MNIST"), ("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")],
    )
    def test_load(self, tmp_path, name, folder):
        raw = write_mnist(tmp_path, folder)
        loaded = load(name, tmp_path)
        assert loaded.name == {"auto": "mnist"}.get(name, name)
        assert (loaded.source, loaded.notice) == (str(tmp_path), None)
        assert len(loaded.class_names) == 10
        for split, size, images, labels in (
            (loaded.train, TRAIN_SIZE, FILES[0], FILES[1]),
            (loaded.test, TEST_SIZE, FILES[2], FILES[3]),
        ):
            assert split.images.shape == (size, 28, 28)
            assert split.images.numpy().tobytes() == (raw / images).read_bytes()[16:]
            assert split.labels.tolist() == list((raw / labels).read_bytes()[8:])

    @pytest.mark.parametrize("given", [".", "MNIST", "MNIST/raw", "elsewhere", "elsewhere/raw"])
    @pytest.mark.parametrize("dotted", [False, True])
    @pytest.mark.parametrize("form", ["plain", "packed", "in a folder of its name"])
    def test_files_in_another_form(self, tmp_path, given, dotted, form):
        """Kaggle's archive has each file twice, once in a folder of its name."""
        expected = load("auto", write_mnist(tmp_path / "as usual").parent.parent)
        raw = write_mnist(tmp_path)
        for file in FILES:
            content = (raw / file).read_bytes()
            (raw / file).unlink()
            name = file.replace("-idx", ".idx") if dotted else file
            path = raw / {"plain": name, "packed": f"{name}.gz"}.get(form, f"{name}/{name}")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(gzip.compress(content) if form == "packed" else content)
        if given.startswith("elsewhere"):
            (tmp_path / given).parent.mkdir(exist_ok=True)
            raw.rename(tmp_path / given)
        loaded = load("auto", tmp_path / given)
        assert (loaded.name, loaded.source) == ("mnist", str(tmp_path / given))
        assert torch.equal(loaded.train.images, expected.train.images)
        assert torch.equal(loaded.test.labels, expected.test.labels)

    @pytest.mark.parametrize(
        ("folder", "given", "name", "found"),
        [
            ("FashionMNIST", "FashionMNIST", "auto", "Fashion-MNIST, not MNIST: pass --dataset"),
            ("FashionMNIST", "FashionMNIST/raw", "mnist", "Fashion-MNIST, not MNIST: pass --data"),
            ("my-fashion", "my-fashion", "mnist", "Fashion-MNIST, not MNIST: pass --dataset fash"),
            ("KMNIST", "KMNIST", "auto", "kmnist, not MNIST: pass another folder"),
            ("MNIST", "MNIST", "fashion-mnist", "MNIST, not Fashion-MNIST: pass --dataset mnist"),
            ("MNIST", "MNIST/raw", "fashion-mnist", "MNIST, not Fashion-MNIST: pass --dataset "),
        ],
    )
    def test_the_folder_of_another_data_set(self, tmp_path, folder, given, name, found):
        write_mnist(tmp_path, folder)
        with pytest.raises(UserError, match=f" holds {found}"):
            load(name, tmp_path / given)
        assert find("fashion-mnist" if name == "fashion-mnist" else "mnist", tmp_path) is None

    def test_the_labels_distinguish_the_sets(self, tmp_path):
        raw = write_mnist(tmp_path, "files")
        labels = bytearray((raw / FILES[1]).read_bytes())
        labels[8:18] = [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
        (raw / FILES[1]).write_bytes(labels)
        with pytest.raises(UserError, match="--dataset fashion-mnist"):
            load("auto", raw)
        assert load("fashion-mnist", raw).name == "fashion-mnist"

    def test_a_misspelt_folder_is_not_passed_over(self, tmp_path, monkeypatch):
        write_mnist(tmp_path / "cache" / "mnist_ext")
        for name, message in (("auto", "there is no folder"), ("mnist", "was not found")):
            with pytest.raises(UserError, match=f"{message}.*/misspelt"):
                load(name, tmp_path / "misspelt")
        monkeypatch.setenv("MNIST_EXT_DATA", str(tmp_path / "misspelt"))
        with pytest.raises(UserError, match=r"\$MNIST_EXT_DATA is .*/misspelt, and there is no"):
            load("auto")
        assert not (tmp_path / "misspelt").exists()
        (tmp_path / "archive.zip").touch()
        with pytest.raises(UserError, match=r"archive\.zip is a file; pass the folder"):
            load("auto", tmp_path / "archive.zip")

    def test_a_relative_folder_is_kept_whole(self):
        write_mnist(Path("data"))
        source = str(Path("data").absolute())
        assert load("auto", "data").source == source
        assert main(["train", "--data-dir", "data", "--epochs", "1", "--name", "run"]) == 0
        assert config_of(Path("runs/run"))["settings"]["data_dir"] == source

    @pytest.mark.mnist
    def test_mnist_itself(self):
        mnist = load("mnist", MNIST_FOLDER)
        assert (len(mnist.train), len(mnist.test)) == (60_000, 10_000)
        assert (round(mnist.mean, 4), round(mnist.std, 4)) == (0.1307, 0.3081)


DAMAGES = {
    "truncated": lambda content: content[:-1],
    "half a header": lambda content: content[:6],
    "empty": lambda content: b"",
    "another magic number": lambda content: b"\x1f\x8b" + content[2:],
    "more announced": lambda content: content[:4] + b"\xff" + content[5:],
    "longer": lambda content: content + b"\0",
    "half a gzip file": lambda content: gzip.compress(content)[:40],
}


class TestDamage:
    @pytest.mark.parametrize("name", ["mnist", "auto"])
    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("damage", [*DAMAGES, "missing", "a folder"])
    def test_the_file_is_named(self, tmp_path, name, file, damage):
        path = write_mnist(tmp_path) / file
        content = path.read_bytes()
        path.unlink()
        if damage in DAMAGES:
            path.write_bytes(DAMAGES[damage](content))
        elif damage == "a folder":
            path.mkdir()
        with pytest.raises(UserError) as caught:
            load(name, tmp_path)
        assert not isinstance(caught.value, DownloadError)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("file", "array", "message"),
        [
            (FILES[1], np.zeros(49), "49 labels for the 50 images"),
            (FILES[0], np.ones((50, 27, 28)), "50 images of 27x28 pixels"),
            (FILES[2], np.ones((0, 28, 28)), "0 images of 28x28 pixels"),
            (FILES[0], np.zeros((50, 28, 28)), "are blank"),
            (FILES[1], np.arange(TRAIN_SIZE) % 11, f"{FILES[1]} is damaged: it holds the label 10"),
            (FILES[3], np.arange(TEST_SIZE) % 11, f"{FILES[3]} is damaged: it holds the label 10"),
        ],
    )
    def test_whole_files_that_make_no_sense(self, tmp_path, file, array, message):
        (write_mnist(tmp_path) / file).write_bytes(idx_bytes(array.astype(np.uint8)))
        with pytest.raises(UserError, match=message):
            load("mnist", tmp_path)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


class TestDownload:
    @pytest.fixture
    def cache(self, tmp_path) -> Path:
        return tmp_path / "cache" / "mnist_ext"

    @pytest.fixture
    def mirror(self, tmp_path, monkeypatch) -> Iterator[Path]:
        """Serve a small MNIST; the result is the folder it is served from."""
        folder = tmp_path / "mirror"
        raw = write_mnist(tmp_path / "original")
        folder.mkdir()
        resources = []
        for file in FILES:
            content = gzip.compress((raw / file).read_bytes())
            (folder / f"{file}.gz").write_bytes(content)
            resources.append((f"{file}.gz", hashlib.md5(content).hexdigest()))
        monkeypatch.setattr(MNIST, "resources", resources)
        handler = partial(QuietHandler, directory=str(folder))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
            Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield folder
            server.shutdown()

    @pytest.mark.parametrize("name", ["auto", "mnist"])
    def test_into_the_cache_and_only_once(self, cache, mirror, name):
        first = load(name)
        assert (first.name, first.source) == ("mnist", str(cache))
        assert len(first.train) == TRAIN_SIZE
        assert names_in(cache) == ["MNIST"]
        for file in mirror.iterdir():
            file.unlink()
        assert torch.equal(load(name).train.images, first.train.images)

    def test_into_the_folder_given(self, tmp_path, cache, mirror):
        given = tmp_path / "new" / "given"
        assert load("mnist", given).source == str(given)
        assert not cache.exists()

    @pytest.mark.parametrize("there", ["MNIST/.DS_Store", "MNIST/raw/t10k-labels-idx1-ubyte.gz"])
    def test_beside_what_a_broken_download_has_left(self, tmp_path, mirror, there):
        path = tmp_path / "given" / there
        path.parent.mkdir(parents=True)
        path.write_bytes(b"something")
        loaded = load("auto", tmp_path / "given")
        assert (loaded.name, loaded.source) == ("mnist", str(tmp_path / "given"))
        assert len(loaded.train) == TRAIN_SIZE
        assert path.exists()
        assert not list((tmp_path / "given").glob(".*"))

    @pytest.mark.parametrize(("file", "given"), [("MNIST", "."), ("file", "file/below")])
    def test_nothing_is_downloaded_that_cannot_be_kept(
        self, tmp_path, mirror, monkeypatch, file, given
    ):
        (tmp_path / file).touch()
        monkeypatch.setattr(MNIST, "download", lambda self: pytest.fail("downloaded"))
        with pytest.raises(DownloadError, match="Not a directory"):
            load("mnist", tmp_path / given)

    @pytest.mark.parametrize(
        ("failure", "message"),
        [
            (Path.unlink, "could not be downloaded"),
            (lambda file: file.write_bytes(gzip.compress(b"something else")), "corrupted"),
        ],
    )
    def test_a_failure_half_way_leaves_nothing(self, cache, mirror, failure, message):
        failure(mirror / f"{FILES[2]}.gz")
        with pytest.raises(DownloadError, match=message):
            load("mnist")
        assert not cache.parent.exists()

    def test_an_interrupt_leaves_nothing(self, cache, mirror, monkeypatch):
        download = MNIST.download

        def interrupted(self):
            download(self)
            assert (Path(self.raw_folder) / FILES[0]).exists()
            raise KeyboardInterrupt

        monkeypatch.setattr(MNIST, "download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load("mnist")
        assert not cache.parent.exists()

    def test_another_process_was_faster(self, cache, mirror, monkeypatch):
        download = MNIST.download

        def overtaken(self):
            download(self)
            write_mnist(cache)

        monkeypatch.setattr(MNIST, "download", overtaken)
        assert len(load("mnist").train) == TRAIN_SIZE
        assert names_in(cache) == ["MNIST"]

    def test_without_a_network(self, cache):
        with pytest.raises(DownloadError) as caught:
            load("mnist")
        message = str(caught.value)
        for part in ("MNIST was not found", "--data-dir", "MNIST_EXT_DATA"):
            assert part in message
        assert "\n" not in message
        loaded = load("auto")
        assert loaded.name == "digits"
        assert loaded.notice == f"{message}; using the 1,797 embedded digits instead"
        assert not cache.parent.exists()

    def test_a_silent_server_does_not_block(self, monkeypatch):
        # It accepts connections and never answers. Without a timeout this test would not end.
        monkeypatch.setattr(datasets, "_NETWORK_TIMEOUT", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
            with pytest.raises(DownloadError, match="timed out"):
                load("mnist")
        assert socket.getdefaulttimeout() is None

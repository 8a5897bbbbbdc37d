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
from torchvision.datasets import MNIST

from mnist_ext.app import UserError
from mnist_ext.app.cli.main import _parser as parser_of_all
from mnist_ext.app.data import datasets

MNIST_FOLDER = os.environ.get("MNIST_EXT_DATA")


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Hide the machine's own data, cache and network."""
    monkeypatch.delenv("MNIST_EXT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])


def files_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


class TestDigits:
    def test_shapes_and_types(self):
        digits = datasets.load("digits")
        assert (len(digits.train), len(digits.test)) == (1437, 360)
        assert digits.notice is None
        for split in (digits.train, digits.test):
            assert split.images.shape == (len(split), 28, 28)
            assert split.images.dtype == torch.uint8
            assert split.labels.dtype == torch.int64
            assert split.labels.unique().tolist() == list(range(10))

    def test_a_digit_fills_the_middle_20x20_pixels(self):
        images = datasets.load("digits").train.images
        brightest = images.amax(dim=0)
        assert brightest.max() == 255
        inside = torch.zeros(28, 28, dtype=torch.bool)
        inside[4:24, 4:24] = True
        assert (brightest[~inside] == 0).all()
        assert (brightest[4, 4:24] > 0).any()
        assert (brightest[23, 4:24] > 0).any()

    def test_labels_belong_to_their_images(self):
        digits = datasets.load("digits")
        train, test = digits.train.images.flatten(1).float(), digits.test.images.flatten(1).float()
        means = torch.stack([train[digits.train.labels == label].mean(0) for label in range(10)])
        nearest = torch.cdist(test, means).argmin(dim=1)
        assert (nearest == digits.test.labels).float().mean() > 0.85

    def test_no_test_image_is_in_the_training_set(self):
        digits = datasets.load("digits")
        distances = torch.cdist(
            digits.test.images.flatten(1).double(), digits.train.images.flatten(1).double()
        )
        assert distances.min() > 1


class TestNormalize:
    def test_formula(self):
        images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
        result = datasets.normalize(images, mean=0.25, std=0.5)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, (images / 255 - 0.25) / 0.5)

    def test_mean_and_std_are_those_of_the_training_images(self):
        digits = datasets.load("digits")
        pixels = datasets.normalize(digits.train.images, digits.mean, digits.std).double()
        assert pixels.mean().item() == pytest.approx(0, abs=1e-5)
        assert pixels.std(correction=0).item() == pytest.approx(1, abs=1e-5)


class TestBatches:
    @staticmethod
    def numbered(size: int) -> datasets.Split:
        """Return images whose pixels all equal their label."""
        labels = torch.arange(size)
        images = labels.to(torch.uint8).view(-1, 1, 1).expand(-1, 28, 28).contiguous()
        return datasets.Split(images, labels)

    def labels(self, seed: int, passes: int = 1) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        split = self.numbered(100)
        return [
            torch.cat(
                [labels for _, labels in datasets.batches(split, 32, 0, 1, generator)]
            ).tolist()
            for _ in range(passes)
        ]

    @pytest.mark.parametrize("shuffled", [False, True])
    def test_every_image_once_with_its_label(self, shuffled):
        generator = torch.Generator().manual_seed(0) if shuffled else None
        result = list(datasets.batches(self.numbered(100), 32, 0, 1 / 255, generator))
        assert [images.shape for images, _ in result] == [
            (32, 1, 28, 28),
            (32, 1, 28, 28),
            (32, 1, 28, 28),
            (4, 1, 28, 28),
        ]
        for images, labels in result:
            assert images.dtype == torch.float32
            assert images.is_contiguous()
            torch.testing.assert_close(
                images, labels.view(-1, 1, 1, 1).expand(images.shape).float()
            )
        seen = torch.cat([labels for _, labels in result])
        assert seen.sort().values.tolist() == list(range(100))
        assert (seen.tolist() == list(range(100))) is not shuffled

    def test_a_seed_determines_the_order(self):
        assert self.labels(seed=1, passes=2) == self.labels(seed=1, passes=2)
        assert self.labels(seed=1) != self.labels(seed=2)

    def test_every_pass_has_another_order(self):
        first, second = self.labels(seed=1, passes=2)
        assert first != second


class TestSearch:
    def test_order_of_the_folders(self, tmp_path, monkeypatch):
        given, configured = tmp_path / "given", tmp_path / "configured"
        cache = tmp_path / "cache" / "mnist_ext"
        monkeypatch.setenv("MNIST_EXT_DATA", str(configured))
        assert datasets.find("mnist", given) is None
        for root in (cache, configured, given):
            write_mnist(root)
            assert datasets.find("mnist", given) == root

    @pytest.mark.parametrize(
        ("name", "folder"),
        [("auto", "MNIST"), ("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")],
    )
    def test_load(self, tmp_path, name, folder):
        raw = write_mnist(tmp_path, folder)
        loaded = datasets.load(name, tmp_path)
        assert loaded.name == {"auto": "mnist"}.get(name, name)
        assert loaded.source == str(tmp_path)
        assert loaded.notice is None
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
    @pytest.mark.parametrize("packed", [False, True])
    def test_files_in_another_form(self, tmp_path, given, dotted, packed):
        expected = datasets.load("auto", write_mnist(tmp_path / "as usual").parent.parent)
        raw = write_mnist(tmp_path)
        for file in FILES:
            path = (raw / file).rename(raw / (file.replace("-idx", ".idx") if dotted else file))
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
        if given.startswith("elsewhere"):
            (tmp_path / given).parent.mkdir(exist_ok=True)
            raw.rename(tmp_path / given)
        loaded = datasets.load("auto", tmp_path / given)
        assert (loaded.name, loaded.source) == ("mnist", str(tmp_path / given))
        assert torch.equal(loaded.train.images, expected.train.images)
        assert torch.equal(loaded.test.labels, expected.test.labels)

    def test_files_in_folders_of_their_names(self, tmp_path):
        """Kaggle's archive has each file twice, once like that."""
        raw = write_mnist(tmp_path)
        for file in FILES:
            (raw / file).rename(raw / "file")
            (raw / file).mkdir()
            (raw / "file").rename(raw / file / file)
        assert datasets.load("auto", raw).name == "mnist"

    @pytest.mark.parametrize("given", ["FashionMNIST", "FashionMNIST/raw", "my-fashion", "KMNIST"])
    @pytest.mark.parametrize("name", ["auto", "mnist"])
    def test_the_folder_of_another_data_set(self, tmp_path, given, name):
        write_mnist(tmp_path, given.split("/")[0])
        with pytest.raises(UserError, match=r"holds .*(Fashion|kmnist).*, not MNIST: pass"):
            datasets.load(name, tmp_path / given)

    def test_mnists_folder_is_not_fashions(self, tmp_path):
        raw = write_mnist(tmp_path)
        for given in (raw, raw.parent):
            with pytest.raises(UserError, match="holds MNIST, not Fashion-MNIST"):
                datasets.load("fashion-mnist", given)
        assert datasets.find("fashion-mnist", tmp_path) is None

    def test_the_labels_tell_the_sets_apart(self, tmp_path):
        raw = write_mnist(tmp_path, "files")
        labels = bytearray((raw / FILES[1]).read_bytes())
        labels[8:18] = [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
        (raw / FILES[1]).write_bytes(labels)
        with pytest.raises(UserError, match="--dataset fashion-mnist"):
            datasets.load("auto", raw)
        assert datasets.load("fashion-mnist", raw).name == "fashion-mnist"

    def test_a_misspelt_folder_is_not_passed_over(self, tmp_path, monkeypatch):
        write_mnist(tmp_path / "cache" / "mnist_ext")
        for name, message in (("auto", "there is no folder"), ("mnist", "was not found")):
            with pytest.raises(UserError, match=f"{message}.*/misspelt"):
                datasets.load(name, tmp_path / "misspelt")
        monkeypatch.setenv("MNIST_EXT_DATA", str(tmp_path / "misspelt"))
        with pytest.raises(UserError, match=r"\$MNIST_EXT_DATA is .*/misspelt, and there is no"):
            datasets.load("auto")
        assert not (tmp_path / "misspelt").exists()

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "archive.zip").touch()
        with pytest.raises(UserError, match=r"archive\.zip is a file; pass the folder"):
            datasets.load("auto", tmp_path / "archive.zip")

    def test_a_relative_folder_is_kept_whole(self, tmp_path, monkeypatch):
        write_mnist(tmp_path / "data")
        monkeypatch.chdir(tmp_path)
        assert datasets.load("auto", "data").source == str(tmp_path / "data")
        args = parser_of_all().parse_args(["train", "--data-dir", "data"])
        assert args.data_dir == str(tmp_path / "data")

    def test_unknown_name(self):
        with pytest.raises(UserError, match="unknown data set 'cifar'"):
            datasets.load("cifar")

    @pytest.mark.mnist
    def test_mnist_itself(self):
        mnist = datasets.load("mnist", MNIST_FOLDER)
        assert (len(mnist.train), len(mnist.test)) == (60_000, 10_000)
        assert (round(mnist.mean, 4), round(mnist.std, 4)) == (0.1307, 0.3081)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:6])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite_the_magic_number(path: Path) -> None:
    path.write_bytes(b"\x1f\x8b" + path.read_bytes()[2:])


def announce_more(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4] = 0xFF
    path.write_bytes(content)


def half_a_gzip_file(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes())[:40])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path) -> None:
    path.unlink()


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


class TestDamage:
    @pytest.mark.parametrize("name", ["mnist", "auto"])
    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize(
        "damage",
        [
            truncate,
            cut_the_header,
            empty,
            overwrite_the_magic_number,
            announce_more,
            append,
            half_a_gzip_file,
            remove,
            replace_by_a_folder,
        ],
    )
    def test_the_file_is_named(self, tmp_path, name, file, damage):
        path = write_mnist(tmp_path) / file
        damage(path)
        with pytest.raises(UserError) as caught:
            datasets.load(name, tmp_path)
        assert not isinstance(caught.value, datasets.DownloadError)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def damaged(self, tmp_path: Path, file: str, array: np.ndarray) -> str:
        """Replace a file's content and return the message about it."""
        (write_mnist(tmp_path) / file).write_bytes(idx_bytes(array.astype(np.uint8)))
        with pytest.raises(UserError) as caught:
            datasets.load("mnist", tmp_path)
        return str(caught.value)

    def test_fewer_labels_than_images(self, tmp_path):
        message = self.damaged(tmp_path, FILES[1], np.zeros(49))
        assert "49 labels for the 50 images" in message

    def test_images_of_another_size(self, tmp_path):
        message = self.damaged(tmp_path, FILES[0], np.ones((50, 27, 28)))
        assert "27x28" in message

    def test_no_images(self, tmp_path):
        message = self.damaged(tmp_path, FILES[2], np.ones((0, 28, 28)))
        assert "0 images" in message

    def test_blank_images(self, tmp_path):
        message = self.damaged(tmp_path, FILES[0], np.zeros((50, 28, 28)))
        assert "blank" in message

    @pytest.mark.parametrize("file", [FILES[1], FILES[3]])
    def test_a_label_out_of_range(self, tmp_path, file):
        size = TRAIN_SIZE if file.startswith("train") else TEST_SIZE
        message = self.damaged(tmp_path, file, np.arange(size) % 11)
        assert file in message
        assert "label 10" in message


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


class TestDownload:
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
    def test_into_the_cache(self, tmp_path, mirror, name):
        loaded = datasets.load(name)
        cache = tmp_path / "cache" / "mnist_ext"
        assert (loaded.name, loaded.source) == ("mnist", str(cache))
        assert len(loaded.train) == TRAIN_SIZE
        assert [path.name for path in cache.iterdir()] == ["MNIST"]

    def test_only_once(self, mirror):
        first = datasets.load("mnist")
        for file in mirror.iterdir():
            file.unlink()
        assert torch.equal(datasets.load("mnist").train.images, first.train.images)

    def test_into_the_folder_given(self, tmp_path, mirror):
        given = tmp_path / "new" / "given"
        assert datasets.load("mnist", given).source == str(given)
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("there", ["MNIST/.DS_Store", "MNIST/raw/t10k-labels-idx1-ubyte.gz"])
    def test_beside_what_a_broken_download_has_left(self, tmp_path, mirror, there):
        path = tmp_path / "given" / there
        path.parent.mkdir(parents=True)
        path.write_bytes(b"something")
        loaded = datasets.load("auto", tmp_path / "given")
        assert (loaded.name, loaded.source) == ("mnist", str(tmp_path / "given"))
        assert len(loaded.train) == TRAIN_SIZE
        assert path.exists()
        assert not list((tmp_path / "given").glob(".*"))

    def test_nothing_is_downloaded_that_cannot_be_kept(self, tmp_path, mirror, monkeypatch):
        (tmp_path / "MNIST").touch()
        monkeypatch.setattr(MNIST, "download", lambda self: pytest.fail("downloaded"))
        with pytest.raises(datasets.DownloadError, match="Not a directory"):
            datasets.load("mnist", tmp_path)

    def test_a_failure_half_way_leaves_nothing(self, tmp_path, mirror):
        (mirror / f"{FILES[2]}.gz").unlink()
        before = files_below(tmp_path)
        with pytest.raises(datasets.DownloadError, match="could not be downloaded"):
            datasets.load("mnist")
        assert files_below(tmp_path) == before

    def test_a_wrong_checksum_leaves_nothing(self, tmp_path, mirror):
        (mirror / f"{FILES[2]}.gz").write_bytes(gzip.compress(b"something else"))
        before = files_below(tmp_path)
        with pytest.raises(datasets.DownloadError, match="corrupted"):
            datasets.load("mnist")
        assert files_below(tmp_path) == before

    def test_an_interrupt_leaves_nothing(self, tmp_path, mirror, monkeypatch):
        download = MNIST.download

        def interrupted(self):
            download(self)
            assert (Path(self.raw_folder) / FILES[0]).exists()
            raise KeyboardInterrupt

        monkeypatch.setattr(MNIST, "download", interrupted)
        before = files_below(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            datasets.load("mnist")
        assert files_below(tmp_path) == before

    def test_another_process_was_faster(self, tmp_path, mirror, monkeypatch):
        download = MNIST.download

        def overtaken(self):
            download(self)
            write_mnist(tmp_path / "cache" / "mnist_ext")

        monkeypatch.setattr(MNIST, "download", overtaken)
        assert len(datasets.load("mnist").train) == TRAIN_SIZE
        cache = tmp_path / "cache" / "mnist_ext"
        assert [path.name for path in cache.iterdir()] == ["MNIST"]

    def test_without_a_network(self, tmp_path):
        with pytest.raises(datasets.DownloadError) as caught:
            datasets.load("mnist")
        message = str(caught.value)
        assert "MNIST was not found" in message
        assert "--data-dir" in message
        assert "MNIST_EXT_DATA" in message
        assert "\n" not in message
        assert files_below(tmp_path) == []

    def test_auto_without_a_network(self, tmp_path):
        loaded = datasets.load("auto")
        assert loaded.name == "digits"
        assert "MNIST was not found" in loaded.notice
        assert "embedded digits" in loaded.notice
        assert "--data-dir" in loaded.notice
        assert files_below(tmp_path) == []

    def test_a_folder_that_cannot_be_written(self, tmp_path, mirror):
        file = tmp_path / "file"
        file.touch()
        with pytest.raises(datasets.DownloadError, match="Not a directory"):
            datasets.load("mnist", file / "below")

    def test_a_silent_server_does_not_block(self, monkeypatch):
        # It accepts connections and never answers. Without a timeout this test would not end.
        monkeypatch.setattr(datasets, "_NETWORK_TIMEOUT", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
            with pytest.raises(datasets.DownloadError, match="timed out"):
                datasets.load("mnist")
        assert socket.getdefaulttimeout() is None

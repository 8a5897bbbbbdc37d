"""``mnist-ext report``: the page is whole, asks for nothing, and can be read by all."""

import base64
import fcntl
import hashlib
import json
import os
import re
import stat
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest
from run_folders import config_of, names_in

from mnist_ext.app.cli.main import main
from mnist_ext.app.report import charts
from mnist_ext.app.report.texts import duration, loss_text
from mnist_ext.app.runs import trained
from mnist_ext.app.training.settings import TrainConfig


def text_of(page: ElementTree.Element) -> str:
    return "".join(page.find("body").itertext())


@pytest.fixture
def odd_run(own_run) -> Path:
    """Return a run with settings that must be escaped."""
    run = own_run.rename(own_run.with_name("a<b>&c"))
    config = config_of(run)
    config["resumed"] = [{"started": "first time"}, {"started": "second time"}]
    config["settings"]["name"] = "<script>alert('x')</script> & <img src=http://example.com/x>"
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.fixture
def page(odd_run, ran) -> ElementTree.Element:
    """Return the page of that run; its tags match."""
    path = odd_run / "report.html"
    assert ran("report", odd_run).out == f"written to {path}\n"
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


class TestPage:
    def test_it_contains_the_figures(self, page, odd_run, ran):
        (scores,) = ran("eval", odd_run, "--json").objects
        record = trained.load_record(odd_run)
        figures = [f"{scores['accuracy']:.2f} %"]
        figures += [f"standard error {scores['accuracy_standard_error']:.2f}"]
        figures += [f"{row['recall']:.2f}" for row in scores["classes"]]
        figures += [f"{epoch.train_loss:.4f}" for epoch in record.epochs]
        figures += [record.config["environment"]["torchvision"]]
        figures += [str(record.config["settings"]["lr"])]
        assert [figure for figure in figures if figure not in text_of(page)] == []
        wrong = scores["images"] - sum(scores["confusion"][i][i] for i in range(10))
        assert len(page.findall(".//img")) == min(24, wrong) > 0
        cells = page.findall(".//table[@class='confusion']//td")
        counts = [n for row in scores["confusion"] for n in row]
        assert [int(cell.text or 0) for cell in cells] == counts

    def test_it_asks_for_nothing(self, page, odd_run):
        tags = {element.tag for element in page.iter()}
        assert not tags & {"link", "iframe", "object", "embed", "form", "base"}
        for element in page.iter():
            for name in ("src", "href", "srcset", "action", "data"):
                assert element.get(name, "data:").startswith("data:")
            assert not any(name.startswith("on") for name in element.keys())  # noqa: SIM118
        style = page.find(".//style").text
        assert "url(" not in style
        assert "@import" not in style
        policy = page.find(".//meta[@http-equiv='Content-Security-Policy']")
        # The only script is that of the square to draw in, by its hash.
        assert [e.get("type") for e in page.iter("script")] == ["application/json", None]
        html = (odd_run / "report.html").read_text(encoding="utf-8")
        code = re.search("<script>(.*?)</script>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert policy.get("content") == (
            "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
            f"script-src 'sha256-{digest}'"
        )

    def test_what_the_run_holds_is_text(self, page):
        for text in (
            "<script>alert('x')</script> & <img src=http://example.com/x>",
            "a<b>&c",
            "start 2: started",
            "second time",
        ):
            assert text in text_of(page)

    def test_everyone_can_read_it(self, page):
        assert all(image.get("alt") for image in page.iter("img"))
        assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.iter("svg"))
        assert all(head.get("scope") in ("col", "row") for head in page.iter("th"))
        assert page.get("lang") == "en"
        ids = {element.get("id") for element in page.iter()}
        assert {section.get("aria-labelledby") for section in page.iter("section")} <= ids
        assert "width=device-width" in page.find(".//meta[@name='viewport']").get("content")
        assert "prefers-color-scheme: dark" in page.find(".//style").text

    def test_settings_that_differ_from_the_defaults_come_first(self, page):
        (section,) = (s for s in page.iter("section") if s.find("h2").text == "Settings")
        first, others = (
            [row.find("th").text for row in table.iter("tr")] for table in section.iter("table")
        )
        assert {"dataset", "recipe", "epochs", "hidden", "lr", "momentum"} <= set(first)
        assert {"seed", "impl", "device"} <= set(others)
        assert {f.name.replace("_", " ") for f in fields(TrainConfig)} == {*first, *others}
        assert section.find("details//table") is not None

    def test_logged_steps_are_drawn(self, own_run, ran):
        def titles() -> list[str]:
            ran("report", own_run)
            page = ElementTree.fromstring((own_run / "report.html").read_text(encoding="utf-8"))
            return [
                svg.find("text").text for svg in page.iter("svg") if svg.find("text") is not None
            ]

        by_epoch = ["Loss (mean cross-entropy)", "Accuracy on the test set, percent"]
        assert titles() == [*by_epoch, "Learning rate"]
        rows = [f"1,{step},{1 / step},{0.1 * step}\n" for step in range(1, 1001)]
        (own_run / "steps.csv").write_text("epoch,step,loss,lr\n" + "".join(rows) + "2,10")
        steps = "Loss of single batches, 200 of 1,000 in steps.csv"
        assert titles() == [*by_epoch, steps, "Learning rate"]
        assert len(trained.load_record(own_run).steps) == 1000

    def test_damaged_steps(self, own_run, refused):
        (own_run / "steps.csv").write_text("epoch,step\n1,1\n")
        refused("report", own_run, parts=("steps.csv is damaged",))

    def test_a_run_that_diverged_says_so(self, page, odd_run, ran):
        assert page.find(".//p[@class='alarm']") is None
        rows = (odd_run / "metrics.csv").read_text()
        (odd_run / "metrics.csv").write_text(rows + "3,1.5e25,nan,9.8,1000,0.25,0.1\n")
        ran("report", odd_run)
        page = ElementTree.fromstring((odd_run / "report.html").read_text(encoding="utf-8"))
        alarm = "".join(page.find(".//p[@class='alarm']").itertext())
        assert "diverged: the test loss was nan after epoch 3. " in alarm
        assert "the model of epoch 2" in alarm
        assert ".alarm { color: var(--alarm)" in page.find(".//style").text
        assert "1.50e+25" in text_of(page)
        assert "250 ms" in text_of(page)

    def test_output_to_what_is_no_regular_file(self, digits_run, capfdbinary):
        """Devices and pipes are written to and stay what they are; links lead to the file."""
        os.mkfifo("pipe")
        Path("device").symlink_to("/dev/null")
        Path("target.html").touch()
        Path("target.html").chmod(0o640)
        Path("link.html").symlink_to("target.html")
        Path("new.html").symlink_to("missing.html")
        there = names_in()
        reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 2**20)  # takes the whole page
        for name in ("pipe", "device", "link.html", "new.html"):
            assert main(["report", str(digits_run), "--output", name]) == 0
        with os.fdopen(reader, "rb") as pipe:
            pages = [pipe.read(), Path("target.html").read_bytes()]
        assert pages[1] == Path("missing.html").read_bytes() == pages[0]
        assert pages[0].startswith(b"<!DOCTYPE html>")
        assert Path("pipe").is_fifo()
        assert Path("device").readlink() == Path("/dev/null")
        assert Path("/dev/null").is_char_device()
        assert Path("link.html").is_symlink()
        assert stat.S_IMODE(Path("target.html").stat().st_mode) == 0o640
        capfdbinary.readouterr()
        for name in ("-", "/dev/stdout"):
            assert main(["report", str(digits_run), "--output", name]) == 0
            assert capfdbinary.readouterr().out == pages[0]
        assert names_in() == sorted([*there, "missing.html"])

    def test_a_name_that_is_not_utf_8(self, own_run, ran):
        run = own_run.rename(own_run.with_name("lat\udce9\x1b[31m"))
        assert "lat\\xe9\\x1b[31m/report.html" in ran("report", run).out
        assert (run / "report.html").read_text(encoding="utf-8").endswith("</html>\n")

    def test_a_file_that_cannot_be_written(self, digits_run, refused):
        argv = ["report", digits_run, "--output", "no/page.html"]
        refused(*argv, parts=("cannot write no/page.html", "--output"))

    def test_a_run_without_metrics(self, own_run, refused):
        (own_run / "metrics.csv").unlink()
        refused("report", own_run, parts=("has no metrics.csv", "first epoch"))


class TestCharts:
    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (94.1, 98.4, [94, 95, 96, 97, 98, 99]), (0, 0, None)],
    )
    def test_ticks_are_round_and_cover(self, low, high, expected):
        marks = charts.ticks(low, high)
        assert marks[0] <= low
        assert marks[-1] >= high
        assert 2 <= len(marks) <= 8
        if expected:
            assert marks == pytest.approx(expected)

    def test_lines_go_from_left_to_right_and_up(self):
        svg = charts.line_chart("t", [1, 2, 3], {"test": [0.0, 1.0, 2.0]}, from_zero=True)
        points = re.search(r'points="([^"]*)"', svg)[1].split()
        xs, ys = zip(*(map(float, p.split(",")) for p in points), strict=True)
        assert list(xs) == sorted(xs)
        assert list(ys) == sorted(ys, reverse=True)

    @pytest.mark.parametrize(
        ("x", "expected"),
        [
            (range(1, 11), list(range(1, 11))),
            (range(1, 26), [5, 10, 15, 20, 25]),
            (range(1, 15), [2, 4, 6, 8, 10, 12, 14]),
            (range(100, 4700, 100), [1000, 2000, 3000, 4000]),
            ([7], [7]),
        ],
    )
    def test_numbers_along_are_at_even_distances(self, x, expected):
        assert charts._marks_along(x) == expected

    def test_a_line_ends_with_its_value_and_has_points(self):
        svg = charts.line_chart("t", [1, 2], {"training": [2.0, 1.0], "test": [2.0, 1.001]})
        chart = ElementTree.fromstring(svg)
        assert len(chart.findall("circle")) == 4
        (test, training) = (chart.find(f"text[@class='{name}']") for name in ("test", "training"))
        assert (test.text, training.text) == ("1.001", "1")
        assert float(training.get("y")) - float(test.get("y")) >= 19  # one above the other
        svg = charts.line_chart("t", [1, 2], {"test": [1.0, float("nan")]})
        assert ">diverged</text>" in svg

    @pytest.mark.parametrize("values", [[float("nan")], [float("inf"), 1.0], [0.5], [1.0] * 5000])
    def test_any_values(self, values):
        svg = charts.line_chart("a & b", list(range(1, len(values) + 1)), {"test": values})
        assert "nan" not in svg
        assert "inf" not in svg
        assert "a &amp; b" in svg
        assert len(svg) < 10_000
        ElementTree.fromstring(svg)

    def test_thinned(self):
        assert charts.thinned(range(5)) == [0, 1, 2, 3, 4]
        few = charts.thinned(range(1000))
        assert len(few) == 200
        assert (few[0], few[-1]) == (0, 999)


def test_texts():
    assert [loss_text(v) for v in (0.12345, 999.0, 1.5e25)] == ["0.1235", "999.0000", "1.50e+25"]
    assert loss_text(float("nan")) == "nan"
    seconds = (0.0004, 0.25, 0.9996, 4.21, 59.96, 200, 7501)
    expected = ["0 ms", "250 ms", "1.0 s", "4.2 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"]
    assert [duration(s) for s in seconds] == expected

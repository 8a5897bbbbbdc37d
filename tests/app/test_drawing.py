"""The square in the report that a digit is drawn in: the page answers as the model does."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from strokes import DIGITS

from mnist_ext.app.cli.main import main
from mnist_ext.app.data import datasets
from mnist_ext.app.report.drawing import drawing, script
from mnist_ext.app.report.scores import logits_of
from mnist_ext.app.runs import trained

NAMES = tuple("0123456789")
MNIST_FOLDER = os.environ.get("MNIST_EXT_DATA")  # before a test hides it
NODE, CHROMIUM = shutil.which("node"), shutil.which("chromium")
# The script's parameters, and its classify, called on images from standard input; the page's
# elements do nothing.
IN_NODE = """
const request = JSON.parse(require("fs").readFileSync(0));
const nothing = new Proxy(() => nothing, { get: (target, name) =>
  name === "textContent" ? JSON.stringify(request.network) : nothing, set: () => true });
const document = { getElementById: () => nothing };
const script = request.script + "\\nreturn [classify, parameters];";
const [classify, parameters] = new Function("document", script)(document);
const answers = request.images.map(classify);
console.log(JSON.stringify({ answers, parameters: Array.from(parameters) }));
"""
# Width and height of what the network sees.
LIT = """(() => {
  const { data } = seen.getImageData(0, 0, SIDE, SIDE);
  const lit = [...Array(SIDE * SIDE).keys()].filter((i) => data[4 * i] > 0);
  return [(i) => i % SIDE, (i) => Math.floor(i / SIDE)].map((along) =>
    Math.max(...lit.map(along)) - Math.min(...lit.map(along)) + 1);
})()"""


@pytest.fixture(scope="module")
def mnist_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on MNIST for two epochs and return the run's report."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--recipe", "best", "--epochs", "2", "--name", "run", "--output-dir", str(folder)]
    assert main(["train", "--dataset", "mnist", "--data-dir", MNIST_FOLDER, *options]) == 0
    assert main(["report", str(folder / "run")]) == 0
    return folder / "run" / "report.html"


def network_of(html: str) -> dict[str, Any]:
    section = ElementTree.fromstring(f"<section>{html}</section>")
    return json.loads(section.find("script[@id='network']").text)


def test_the_parameters_are_the_models(digits_run):
    model = trained.load(digits_run)
    network = network_of(drawing(model, NAMES))
    values = np.frombuffer(base64.b64decode(network["parameters"]), "<f2").astype(np.float32)
    expected = torch.cat([p.flatten() for p in model.model.parameters()]).numpy()
    np.testing.assert_allclose(values, expected, rtol=2**-11, atol=2**-25)
    assert network["layers"] == [
        {"inputs": 784, "outputs": 32, "relu": True},
        {"inputs": 32, "outputs": 10, "relu": False},
    ]
    assert (network["mean"], network["std"]) == (model.mean, model.std)
    assert (network["by_mass"], network["names"]) == (False, list(NAMES))


def test_no_square_for_a_model_that_the_script_cannot_run(digits_run):
    def without(change) -> bool:
        model = trained.load(digits_run)
        change(model)
        return drawing(model, NAMES) is None

    assert not without(lambda model: None)
    assert without(lambda model: model.model.append(torch.nn.Tanh()))
    assert without(lambda model: model.model[1].weight.fill_(1e5))  # no float16
    assert without(lambda model: object.__setattr__(model, "dataset", "fashion-mnist"))
    assert without(lambda model: model.model.append(torch.nn.Linear(2000, 2001)))  # 4 million


@pytest.mark.skipif(NODE is None, reason="there is no node to run the page's script")
def test_the_script_answers_as_the_model_does(digits_run):
    model = trained.load(digits_run)
    model.model[1].weight[0, :3] = torch.tensor([2**-24, -(2**-15), 0.0])  # subnormal float16
    images = datasets.load("digits").test.images[:20]
    request = {
        "network": network_of(drawing(model, NAMES)),
        "script": script(),
        "images": (images.flatten(1) / 255).tolist(),
    }
    result = subprocess.run(
        [NODE, "-e", IN_NODE], input=json.dumps(request), text=True, stdout=subprocess.PIPE
    )
    split = datasets.Split(images, torch.zeros(20, dtype=torch.int64))
    expected = logits_of(model.model, split, model.mean, model.std).softmax(1)
    got = {name: torch.tensor(values) for name, values in json.loads(result.stdout).items()}
    halves = torch.cat([p.flatten() for p in model.model.parameters()]).half()
    assert torch.equal(got["parameters"].half(), halves)
    torch.testing.assert_close(got["answers"], expected, rtol=0, atol=2e-3)  # float16


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        path = CHROMIUM or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("there is no Chromium")
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.mnist
@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (375, "dark"), (1280, "dark")])
def test_all_digits_drawn_in_a_browser(browser, mnist_report, width, scheme):
    """By finger on a phone, by mouse on a desktop; nothing is asked for, nothing is wider."""
    phone = width < 500
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=phone
    )
    page = context.new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(mnist_report.as_uri())
    touch = context.new_cdp_session(page)
    square = page.locator("#square")
    square.scroll_into_view_if_needed()
    box = square.bounding_box()

    def move(kind: str, point: tuple[float, float] | None) -> None:
        at = [] if point is None else [{"x": point[0], "y": point[1]}]
        if phone:
            touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": at})
        elif kind == "Move":
            page.mouse.move(*point)
        else:
            {"Start": page.mouse.down, "End": page.mouse.up}[kind]()

    seen = {}
    for digit, strokes in DIGITS.items():
        for stroke in strokes:
            points = [
                (box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke
            ]
            if not phone:
                page.mouse.move(*points[0])
            move("Start", points[0])
            for point in points[1:]:
                move("Move", point)
            move("End", None)
        if not phone:
            page.mouse.move(box["x"] + 5, box["y"] + box["height"] / 2)  # no button
        ink = page.evaluate("(({ x, y }) => [x, y])(byId('ink').getBBox())")
        corner = [min(point[axis] for stroke in strokes for point in stroke) for axis in (0, 1)]
        assert ink == pytest.approx(corner, abs=0.02)
        assert max(page.evaluate(LIT)) in (20, 21)  # MNIST's digits are 20 pixels long
        share = page.locator("#bars td").nth(digit).inner_text()
        seen[digit] = page.locator("#answer").inner_text(), float(share.removesuffix(" %")) > 50
        page.locator("#clear").click()
        assert page.locator("#answer").inner_text() == "?"
    assert seen == {digit: (str(digit), True) for digit in DIGITS}
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate(
        "[getComputedStyle(byId('ink')).stroke, getComputedStyle(byId('square')).backgroundColor]"
    )
    assert (lightness(ink) > lightness(paper)) == (scheme == "dark")
    assert asked == [mnist_report.as_uri()]
    assert errors == []
    context.close()


def lightness(color: str) -> int:
    """Return the sum of the levels of `rgb(1, 2, 3)`."""
    return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(",")))

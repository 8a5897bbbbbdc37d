"""A square to draw a digit in, with the model of a run inside the page to answer."""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

import torch
from torch import nn

from mnist_ext.app.runs.trained import Trained

# A page with more parameters, two bytes each and a third more as text, is slow to open.
_MOST_PARAMETERS = 4_000_000


def script() -> str:
    """Return the script of the page, which is XML as well."""
    source = (files("mnist_ext.app.report") / "drawing.js").read_text(encoding="utf-8")
    return f"//<![CDATA[\n{source}//]]>"


def script_hash() -> str:
    """Return what a content security policy calls the script."""
    digest = hashlib.sha256(script().encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")


def drawing(trained: Trained, names: Sequence[str]) -> str | None:
    """Return the square, the network and the script.

    Args:
        trained: the model.
        names: of the classes.

    Returns:
        HTML, or None for a model that the script cannot run, that is too large or that was trained
        on what nobody draws with a pen.
    """
    layers = _layers(trained.model)
    if layers is None or trained.dataset not in ("mnist", "digits"):
        return None
    parameters = torch.cat([value.flatten() for value in trained.model.state_dict().values()])
    halves = parameters.cpu().half()
    if len(halves) > _MOST_PARAMETERS or not halves.isfinite().all():
        return None
    content = halves.numpy().astype("<f2").tobytes()
    network = {
        "layers": layers,
        "mean": trained.mean,
        "std": trained.std,
        "by_mass": trained.dataset == "mnist",
        "names": names,
        "parameters": base64.b64encode(content).decode("ascii"),
    }
    data = json.dumps(network).replace("&", "\\u0026").replace("<", "\\u003c")
    rows = "\n".join(f'<tr><th scope="row">{escape(name)}</th><td></td></tr>' for name in names)
    return f"""<p class="soft">By mouse or finger. The page holds the network's {len(halves):,}
parameters, as float16.</p>
<noscript><p>This needs JavaScript.</p></noscript>
<div class="draw">
<svg id="square" viewBox="0 0 1 1" role="img" aria-label="square to draw a digit in">
<path id="ink" d=""/></svg>
<div class="seen">
<output id="answer" aria-label="the network's answer">?</output>
<canvas id="seen" width="28" height="28" role="img" aria-label="the network's input"></canvas>
<p class="soft">its input, 28x28</p>
<button id="clear" type="button">Clear</button>
</div>
<table aria-label="probabilities"><tbody id="bars">
{rows}
</tbody></table>
</div>
<script type="application/json" id="network">{data}</script>
<script>{script()}</script>"""


def _layers(model: nn.Sequential) -> list[dict[str, int | bool]] | None:
    """Return the shapes of a chain of Linear and ReLU, or None for another model."""
    layers: list[dict[str, int | bool]] = []
    for module in model:
        if isinstance(module, nn.Linear) and module.bias is not None:
            relu = getattr(module, "activation", "none") == "relu"
            layers.append(
                {"inputs": module.in_features, "outputs": module.out_features, "relu": relu}
            )
        elif isinstance(module, nn.ReLU) and layers:
            layers[-1]["relu"] = True
        elif not isinstance(module, nn.Flatten):
            return None
    return layers

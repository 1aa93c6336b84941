"""A small run made by hand, diagnostics that say known things of it, and the report they make."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.models import ColumnDataSource

from bnviz import catalog, figures
from bnviz.report import Report, diagnose
from bnviz.run import Run
from bnviz.schema import Finding, Judgement, Saving, Variable, diagnostic, stamp, view
from bnviz.views import style

GIVES = {
    "head_share": (Variable("share", ("layer", "head"), "1", "Share of attention mass."),),
    "layer_size": (Variable("norm", ("layer",), "norm", "Norm of the output."),),
    "dense_map": (Variable("share", ("layer", "head"), "1", "Share of attention mass."),),
}


def make_run(layers: int = 4, heads: int = 6) -> Run:
    """Mass grows with layer and head, so that every answer is known: the largest is the last head of the last layer."""
    mass = np.arange(layers * heads, dtype=np.float32).reshape(1, layers, heads, 1) * np.ones(8, np.float32)
    coords = {"layer": np.arange(layers), "path": ("layer", [f"model.layers.{i}.self_attn" for i in range(layers)])}
    attention = xr.Dataset({"mass": (("step", "layer", "head", "key"), mass)}, coords, {"model": "toy"})
    norm = np.linspace(1, 2, layers, dtype=np.float32).reshape(1, layers, 1) * np.ones(8, np.float32)
    activations = xr.Dataset(
        {"norm_out": (("step", "layer", "token"), norm), "sample": (("step", "sample"), np.zeros((1, 5), np.float32))},
        coords,
        {"model": "toy"},
    )
    facts = {
        "model": "toy <b>model</b>",
        "class": "Toy",
        "parameters": 824_448,
        "seconds": 0.034,
        "options": {"budget": 2**30},
    }
    return Run(
        {"attention": attention, "activations": activations}, {**facts, "notes": ["The probe x stopped at step 3."]}
    )


def file_of(name: str, judge: Any) -> ModuleType:
    """A module that holds `judge`, as the file of a diagnostic does."""
    module = ModuleType(f"toy_{name}")
    vars(module)["judge"] = judge
    return module


def _shares(attention: xr.Dataset, scale: float) -> xr.Dataset:
    mass = attention["mass"].mean(("step", "key"))
    data = xr.Dataset({"share": scale * mass / float(mass.max())}, attrs={"model": "toy"})
    return data.assign_coords(path=("layer", attention["path"].values))


@diagnostic(question="What does each head do?", needs=("attention.mass",), gives=GIVES["head_share"], order=1)
def head_share(attention: xr.Dataset, *, scale: float = 1.0) -> xr.Dataset:
    """Share of the largest head."""
    return stamp(_shares(attention, scale), GIVES["head_share"])


def judge_heads(result: xr.Dataset, *, least: float = 0.5) -> Judgement:
    layer, head = np.unravel_index(int(result["share"].values.argmax()), result["share"].shape)
    where = {"layer": int(layer), "head": int(head), "path": str(result["path"].values[layer])}
    found = Finding(
        "head_share/most", "One head holds <i>everything</i>", "medium", where, 1.0, least, advice="Look at it."
    )
    saving = Saving(419430.4, "B", 0.15, "computed from shapes")
    cheap = Finding(
        "head_share/least", "Head 0 of layer 0 holds nothing", "low", {"layer": 0, "head": 0}, saving=saving
    )
    return Judgement("Layer and head are known", "share · toy", "The largest is 1.", ("One seed.",), (found, cheap))


@diagnostic(question="How large is each layer?", needs=("activations.norm_out",), gives=GIVES["layer_size"], order=2)
def layer_size(activations: xr.Dataset) -> xr.Dataset:
    """Norm a layer."""
    norm = activations["norm_out"].mean(("step", "token")).rename("norm")
    return stamp(xr.Dataset({"norm": norm}, attrs={"model": "toy"}), GIVES["layer_size"])


def judge_sizes(result: xr.Dataset) -> Judgement:
    wide = Finding("layer_size/several", "Two layers are alike", "note", {"layer": [0, 1]}, advice="Skip one.")
    return Judgement("The last layer is largest", "norm · toy", "", (), (wide,))


@diagnostic(question="And of very many?", needs=("attention.mass",), gives=GIVES["dense_map"], order=3)
def dense_map(attention: xr.Dataset) -> xr.Dataset:
    """Share of the largest head."""
    return stamp(_shares(attention, 1.0), GIVES["dense_map"])


def judge_dense(result: xr.Dataset) -> Judgement:
    return Judgement("No cell passes 2", "share · toy")


@diagnostic(question="Which experts work?", needs=("routing.expert",), gives=(), order=4)
def expert_toy(routing: xr.Dataset) -> xr.Dataset:
    """Needs what the run does not hold."""
    return routing


@diagnostic(question="What of the label is kept?", needs=("labels.label", "activations.sample"), gives=(), order=5)
def label_toy(labels: xr.Dataset, activations: xr.Dataset) -> xr.Dataset:
    """Counts labels."""
    assert activations.sizes["sample"] == labels.sizes["sample"]
    return xr.Dataset(attrs={"classes": int(labels["label"].max()) + 1, "table": labels.attrs.get("table", [])})


@diagnostic(question="Does it break?", needs=("attention.mass",), gives=(), order=6)
def broken_toy(attention: xr.Dataset) -> xr.Dataset:
    """Raises."""
    raise ZeroDivisionError("no <mass> here")


def judge_nothing(result: xr.Dataset) -> Judgement:
    return Judgement("Nothing to say", "toy")


@view(of="head_share")
def head_atlas(result: xr.Dataset, *, compact: bool = False) -> Any:
    """Layer across, head down."""
    share = result["share"]
    layer, head = np.indices(share.shape)
    data = {"layer": layer.ravel(), "head": head.ravel(), "value": share.values.ravel().astype("f4")}
    data["path"] = result["path"].values[data["layer"]].astype(object)
    source = ColumnDataSource(data, name="atlas")
    plot = style.figure(width=480, height=260, x="layer", y="head", grid="", name="atlas")
    colours = style.mapper("ramp", 0, 1)
    cells = plot.rect(
        "layer", "head", 0.94, 0.94, source=source, fill_color={"field": "value", "transform": colours}, line_color=None
    )
    plot.add_tools(style.hover(cells, [("", "layer @layer head @head"), ("share", "@value")]))
    plot.add_layout(style.color_bar(colours, "share"), "right")
    style.tap(cells, plot)
    return plot


@view(of="layer_size")
def layer_bars(result: xr.Dataset, *, compact: bool = False) -> Any:
    """One bar a layer."""
    layers = np.arange(result.sizes["layer"])
    source = ColumnDataSource(
        {"layer": layers, "value": result["norm"].values, "head": np.full(len(layers), -1)}, name="strip"
    )
    plot = style.figure(width=480, height=200, x="layer", y="norm", name="strip")
    plot.vbar("layer", 0.7, "value", source=source, fill_color=style.SERIES[0], line_color=None)
    plot.xaxis.ticker = style.place_ticks(len(layers))
    return plot


@view(of="dense_map")
def dense_image(result: xr.Dataset, *, compact: bool = False) -> Any:
    """One image, with cells that can be chosen."""
    share = result["share"].values.T
    plot = style.figure(width=760, height=260, x="layer", y="head", grid="", name="dense")
    heads, layers = share.shape
    plot.image([share], x=-0.5, y=-0.5, dw=layers, dh=heads, color_mapper=style.mapper("ramp", 0, 1))
    style.tap_cells(plot, "layer", "head", (layers, heads), paths=[str(p) for p in result["path"].values])
    return plot


TOYS = {
    "head_share": (head_share, judge_heads),
    "layer_size": (layer_size, judge_sizes),
    "dense_map": (dense_map, judge_dense),
    "expert_toy": (expert_toy, judge_nothing),
    "label_toy": (label_toy, judge_nothing),
    "broken_toy": (broken_toy, judge_nothing),
}
VIEWS = {"head_share": (head_atlas,), "layer_size": (layer_bars,), "dense_map": (dense_image,)}


@pytest.fixture(scope="module")
def toys() -> Iterator[None]:
    """The catalogue holds the toy diagnostics and nothing else."""
    real_names, real_load = catalog.names, catalog.load
    with pytest.MonkeyPatch.context() as patch:
        for name, (function, judge) in TOYS.items():
            module = file_of(name, judge)
            patch.setattr(function, "__module__", module.__name__)
            patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(catalog, "names", lambda room: tuple(sorted(TOYS)) if room == "diagnostics" else real_names(room))
        patch.setattr(
            catalog, "load", lambda room, name: TOYS[name][0] if room == "diagnostics" else real_load(room, name)
        )
        patch.setattr(figures, "views_of", lambda name: VIEWS.get(name, ()))
        yield


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run()


@pytest.fixture(scope="module")
def report(toys: None, run: Run) -> Report:
    return diagnose(run)


@pytest.fixture(scope="module")
def of_size(toys: None) -> Callable[[int, int], Report]:
    """A report on a model with so many layers and heads."""
    return lambda layers, heads: diagnose(make_run(layers, heads))


@pytest.fixture(scope="module")
def two(toys: None) -> tuple[Report, Report]:
    """Reports of two models, to stand in one page."""
    runs = (make_run(), make_run(3, 2))
    for run, name in zip(runs, ("first", "second"), strict=True):
        run.provenance["model"] = name
    return diagnose(runs[0], "head_share", "layer_size"), diagnose(runs[1], "head_share", "layer_size")

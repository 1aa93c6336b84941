"""Which key-value heads keep their whole cache and which only sinks and recent tokens: lists to write and to read.

A list is a plain dict, ready for JSON; whoever patches a model can read it without bnviz.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import NotCaptured, SchemaError, StoreError

if TYPE_CHECKING:
    import numpy.typing as npt
    import xarray as xr

FULL, STREAMING = "full", "streaming"
_CACHES = (FULL, STREAMING)


def neediest(share: npt.NDArray[np.floating[Any]], kv_heads: int) -> npt.NDArray[np.floating[Any]]:
    """(layer, head) to (layer, kv_head): the largest of the query heads that share a kv head; NaN where one is not known.

    Examples
    --------
    >>> neediest(np.array([[0.1, 0.4, 0.0, np.nan]]), 2).tolist()
    [[0.4, nan]]
    """
    layers, heads = share.shape
    if kv_heads < 1 or heads % kv_heads:
        raise SchemaError(f"{heads} query heads cannot share {kv_heads} key-value heads; expected a multiple of them.")
    return np.asarray(share.reshape(layers, kv_heads, -1).max(axis=-1))


def head_list(result: xr.Dataset, *, retrieval: float = 0.05) -> dict[str, Any]:
    """For each layer and kv head, whether it keeps its whole cache or only sinks and recent tokens.

    Parameters
    ----------
    result : Dataset
        From `bnviz.diagnostics.kv_budget`, or from `bnviz.diagnostics.retrieval_heads`.
    retrieval : float
        Of `kv_budget`: a kv head keeps all when one of its query heads puts more than this share of its attention beyond sinks
        and recent tokens, or when that is not known. Of `retrieval_heads` the heads that it names keep all, and those that are
        not known; where it names none, every head streams, and only the loss on long texts says whether that is right.

    Returns
    -------
    dict
        JSON-able: `kind`, `model`, `tokens`, `retrieval`, `sinks`, `recent`, `of` (what `value` is: "retrieval_share", or
        "copies", the larger of echo and induction of its query heads) and `layers`, each with
        `layer`, `path` and `kv_heads`: `kv_head`, `cache` ("full" or "streaming"), `value` (None: not known), and where it
        streams `sinks` and `recent`, in tokens.

    Raises
    ------
    NotCaptured
        The dataset is a result of neither.

    Examples
    --------
    >>> import xarray as xr
    >>> share = xr.Dataset({"retrieval_share": (("layer", "head"), [[0.01, 0.02, 0.3, 0.0]])}, {"layer": [0]})
    >>> made = head_list(share.assign_attrs(kv_heads=2, sinks=4, local=128))
    >>> [head["cache"] for head in made["layers"][0]["kv_heads"]]
    ['streaming', 'full']
    """
    if {"role", "echo", "induction", "kv_heads"} <= set(result.variables):
        return _of_copies(result)
    if "retrieval_share" not in result or not {"kv_heads", "sinks", "local"} <= set(result.attrs):
        raise NotCaptured(
            "head_list needs a result of kv_budget: bnviz.diagnostics.kv_budget(attention, keys_values); or one of "
            "retrieval_heads."
        )
    attrs = result.attrs
    sizes = int(attrs["sinks"]), int(attrs["local"])
    share = neediest(result["retrieval_share"].values, int(attrs["kv_heads"]))
    paths = [str(p) for p in result["path"].values] if "path" in result.coords else [""] * len(share)
    layers = [
        {
            "layer": int(layer),
            "path": path,
            "kv_heads": [_head(at, value, value <= retrieval, sizes) for at, value in enumerate(row.tolist())],
        }
        for layer, path, row in zip(result["layer"].values, paths, share, strict=True)
    ]
    return _list(attrs, "retrieval_share", float(retrieval), layers)


def _list(attrs: Mapping[Any, Any], of: str, retrieval: float, layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "kind": "kv_head_list",
        "model": str(attrs.get("model", "model")),
        "tokens": int(attrs.get("tokens", 0)),
        "of": of,
        "retrieval": retrieval,
        "sinks": int(attrs["sinks"]),
        "recent": int(attrs["local"]),
        "layers": layers,
    }


def _of_copies(result: xr.Dataset) -> dict[str, Any]:
    """A list from `retrieval_heads`: layers may have other numbers of heads."""
    attrs, role = result.attrs, result["role"].values
    sizes = int(attrs["sinks"]), int(attrs["local"])
    share = np.maximum(result["echo"].values, result["induction"].values)
    paths = [str(p) for p in result["path"].values] if "path" in result.coords else [""] * len(share)
    layers = []
    for row, (layer, many) in enumerate(zip(result["layer"].values, result["kv_heads"].values, strict=True)):
        there = max([int(many), *(np.flatnonzero(np.isfinite(share[row])) + 1).tolist()])
        values = neediest(share[row : row + 1, :there], int(many))[0].tolist()
        finds = neediest((role[row : row + 1, :there] >= 0).astype(float), int(many))[0].tolist()
        heads = [_head(at, value, math.isfinite(value) and not finds[at], sizes) for at, value in enumerate(values)]
        layers.append({"layer": int(layer), "path": paths[row], "kv_heads": heads})
    return _list(attrs, "copies", float(attrs["least"]), layers)


def _head(at: int, value: float, streams: bool, sizes: tuple[int | None, int | None]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "kv_head": at,
        "cache": STREAMING if streams else FULL,
        "value": value if math.isfinite(value) else None,
    }
    return made | ({"sinks": sizes[0], "recent": sizes[1]} if streams else {})


def read_head_list(path: str | Path, *, threshold: float = 0.5) -> dict[str, Any]:
    """A list written from `head_list` as JSON, or a table of DuoAttention, in the same form.

    Parameters
    ----------
    path : str or Path
        A `.json` of `head_list`; or a `full_attention_heads.tsv`, one row a layer and one column a kv head, values 0 to 1 (beyond
        these clipped, as DuoAttention does). The folder of such a table will do; a `config.json` in it tells `sink_size` and
        `recent_size`, without which `sinks` and `recent` are None.
    threshold : float
        Of a table: from this value on a head keeps its whole cache.

    Returns
    -------
    dict
        As `head_list` makes. Of a table `of` is "gate", and layers have no paths.

    Raises
    ------
    StoreError
        No such file, or it cannot be read as what its name says.
    SchemaError
        It was read, and is no such list: the message says where.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "full_attention_heads.tsv").write_text("0.9\\t0.1\\n")
    ...     read_head_list(folder)["layers"][0]["kv_heads"][1]["cache"]
    'streaming'
    """
    file = Path(path)
    if file.is_dir():
        file = file / "full_attention_heads.tsv"
    text = _text(file)
    if file.suffix == ".json":
        return _checked(_json(text, file), file)
    if file.suffix != ".tsv":
        raise StoreError(f"{file} is neither .json (a list of bnviz) nor .tsv (a table of DuoAttention).")
    gates = _table(text, file)
    config = file.parent / "config.json"
    told = _json(_text(config), config) if config.is_file() else {}
    if not isinstance(told, Mapping):
        raise SchemaError(f"{config}: expected an object with sink_size and recent_size.")
    sizes = _tokens(told, "sink_size", config), _tokens(told, "recent_size", config)
    layers = [
        {
            "layer": at,
            "path": "",
            "kv_heads": [_head(head, value, value < threshold, sizes) for head, value in enumerate(row)],
        }
        for at, row in enumerate(gates)
    ]
    of_table = {"kind": "kv_head_list", "model": "", "tokens": 0, "of": "gate", "threshold": float(threshold)}
    return of_table | {"sinks": sizes[0], "recent": sizes[1], "layers": layers}


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{file} cannot be read: {error}.") from error


def _json(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise StoreError(f"{file} is no JSON: {error}.") from error


def _tokens(told: Mapping[str, Any], name: str, file: Path) -> int | None:
    value = told.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise SchemaError(f"{file}: {name} is {value!r}, expected a number of tokens.")
    return value


def _table(text: str, file: Path) -> list[list[float]]:
    """Rows of numbers between 0 and 1, all of one length."""
    rows: list[list[float]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = [float(cell) for cell in line.strip().split("\t")]
        except ValueError as error:
            raise SchemaError(f"{file}, line {number}: expected numbers between tabs, found {line[:60]!r}.") from error
        if not all(map(math.isfinite, row)):
            raise SchemaError(f"{file}, line {number}: expected values from 0 to 1, found {line[:60]!r}.")
        if rows and len(row) != len(rows[0]):
            raise SchemaError(f"{file}, line {number}: {len(row)} kv heads, expected {len(rows[0])} as above.")
        rows.append([min(max(value, 0.0), 1.0) for value in row])
    if not rows:
        raise SchemaError(f"{file} is empty; expected one row a layer, one column a kv head.")
    return rows


def _checked(made: Any, file: Path) -> dict[str, Any]:
    """`made`, if it is what `head_list` makes."""
    if not isinstance(made, dict) or made.get("kind") != "kv_head_list":
        raise SchemaError(f"{file}: expected an object with kind 'kv_head_list', as head_list makes it.")
    layers = made.get("layers")
    if not isinstance(layers, list) or not layers:
        raise SchemaError(f"{file}: layers is missing or empty.")
    for at, layer in enumerate(layers):
        heads = layer.get("kv_heads") if isinstance(layer, dict) else None
        if not isinstance(heads, list) or not isinstance(layer.get("layer"), int):
            raise SchemaError(f"{file}: entry {at} of layers has no layer or no kv_heads.")
        for head in heads:
            if not isinstance(head, dict) or head.get("cache") not in _CACHES:
                raise SchemaError(
                    f"{file}: layer {layer['layer']} has a kv head without cache; valid: {', '.join(_CACHES)}."
                )
            if head["cache"] == STREAMING:
                for name in ("sinks", "recent"):
                    _tokens(head, name, file)
    return made

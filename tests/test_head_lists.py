"""Lists of heads: what is written is read again, published tables have the same form, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from bnviz.errors import NotCaptured, SchemaError, StoreError
from bnviz.head_lists import head_list, neediest, read_head_list


def result(share: Any, kv_heads: int) -> xr.Dataset:
    share = np.asarray(share, float)
    coords = {"layer": np.arange(len(share)) + 3, "path": ("layer", [f"layers.{i + 3}" for i in range(len(share))])}
    data = xr.Dataset({"retrieval_share": (("layer", "head"), share)}, coords)
    return data.assign_attrs(model="paper", tokens=500, kv_heads=kv_heads, sinks=4, local=128)


def caches(made: dict[str, Any]) -> list[list[str]]:
    return [[head["cache"] for head in layer["kv_heads"]] for layer in made["layers"]]


# ------------------------------------------------------------------------------------------------------------ a list
def test_a_kv_head_streams_when_all_its_query_heads_do_and_it_is_known() -> None:
    made = head_list(result([[0.01, 0.05, 0.04, 0.06], [0.0, np.nan, 0.0, 0.0]], 2))
    assert caches(made) == [["streaming", "full"], ["full", "streaming"]]
    first, second = made["layers"]
    assert first["layer"] == 3 and first["path"] == "layers.3"
    assert first["kv_heads"][0] == {"kv_head": 0, "cache": "streaming", "value": 0.05, "sinks": 4, "recent": 128}
    assert first["kv_heads"][1] == {"kv_head": 1, "cache": "full", "value": 0.06}
    assert second["kv_heads"][0] == {"kv_head": 0, "cache": "full", "value": None}
    assert caches(head_list(result([[0.01, 0.05, 0.04, 0.06]], 2), retrieval=0.06)) == [["streaming", "streaming"]]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = head_list(result(np.random.default_rng(0).random((3, 8)) / 10, 4))
    file = tmp_path / "heads.json"
    file.write_text(json.dumps(made, allow_nan=False), "utf-8")
    assert read_head_list(file) == made


def test_heads_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(SchemaError, match="4 query heads cannot share 3"):
        neediest(np.zeros((1, 4)), 3)
    with pytest.raises(NotCaptured, match="result of kv_budget"):
        head_list(xr.Dataset())


# ------------------------------------------------------------------------------------------------- a published table
def table(folder: Path, gates: Any, config: str | None = '{"sink_size": 64, "recent_size": 256, "lr": 0.02}') -> Path:
    np.savetxt(folder / "full_attention_heads.tsv", gates, delimiter="\t")
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


def test_a_table_of_duoattention_has_the_same_form(tmp_path: Path) -> None:
    gates = [[0.9, 0.5, 0.1], [-0.001, 1.2, 0.49]]
    made = read_head_list(table(tmp_path, gates))
    assert made == read_head_list(tmp_path / "full_attention_heads.tsv")
    assert caches(made) == [["full", "full", "streaming"], ["streaming", "full", "streaming"]]
    assert made["layers"][1]["kv_heads"][0] == {
        "kv_head": 0, "cache": "streaming", "value": 0.0, "sinks": 64, "recent": 256
    }  # fmt: skip
    assert made["layers"][1]["kv_heads"][1]["value"] == 1.0
    assert made["sinks"] == 64 and made["of"] == "gate"
    assert caches(read_head_list(tmp_path, threshold=0.95)) == [["streaming"] * 3, ["streaming", "full", "streaming"]]
    json.dumps(made)
    written = tmp_path / "again.json"
    written.write_text(json.dumps(made))
    assert read_head_list(written) == made


def test_a_table_without_its_config_has_no_sizes(tmp_path: Path) -> None:
    made = read_head_list(table(tmp_path, [[0.1, 0.9]], None))
    assert made["sinks"] is None and made["layers"][0]["kv_heads"][0]["recent"] is None


# ----------------------------------------------------------------------------------------------------- what is wrong
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("0.1\t0.2\n0.3\n", "line 2: 1 kv heads, expected 2"),
        ("0.1\t0.2\n\n0.3\tfull\n", "line 3: expected numbers"),
        ("0.1,0.2\n", "line 1: expected numbers between tabs"),
        ("0.1\tnan\n", "line 1: expected values from 0 to 1"),
    ],
)
def test_a_wrong_table_is_told_by_its_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "heads.tsv"
    file.write_text(text)
    with pytest.raises(SchemaError, match=words):
        read_head_list(file)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ("{", StoreError, "is no JSON"),
        ("[]", SchemaError, "expected an object"),
        ('{"sink_size": "4"}', SchemaError, "sink_size is '4'"),
        ('{"sink_size": 4, "recent_size": -1}', SchemaError, "recent_size is -1"),
    ],
)
def test_a_wrong_config_is_named(tmp_path: Path, config: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_head_list(table(tmp_path, [[0.1]], config))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ([], "kind 'kv_head_list'"),
        ({"kind": "kv_head_list"}, "layers is missing"),
        ({"kind": "kv_head_list", "layers": [{"layer": 0}]}, "entry 0 of layers"),
        ({"kind": "kv_head_list", "layers": [{"layer": 0, "kv_heads": [{"cache": "half"}]}]}, "valid: full, streaming"),
        (
            {"kind": "kv_head_list", "layers": [{"layer": 0, "kv_heads": [{"cache": "streaming", "sinks": 0.5}]}]},
            "sinks is 0.5",
        ),
    ],
)
def test_a_json_that_is_no_list_is_told_why(tmp_path: Path, made: Any, words: str) -> None:
    file = tmp_path / "heads.json"
    file.write_text(json.dumps(made))
    with pytest.raises(SchemaError, match=words):
        read_head_list(file)


def test_a_file_that_is_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        read_head_list(tmp_path / "none.json")
    with pytest.raises(StoreError, match="cannot be read"):
        read_head_list(tmp_path)
    other = tmp_path / "heads.npy"
    other.write_bytes(b"\x93NUMPY")
    with pytest.raises(StoreError):
        read_head_list(other)
    text = tmp_path / "heads.txt"
    text.write_text("0.1")
    with pytest.raises(StoreError, match=r"neither \.json"):
        read_head_list(text)

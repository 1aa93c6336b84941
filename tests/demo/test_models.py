"""What travels with bnviz: the models load and are what their README says, the text is whole, nothing names a machine."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path

import pytest
import torch

from bnviz import demo
from bnviz.errors import MissingDependency, UnknownName

FOLDER = Path(demo.__file__).parent / "models"


@pytest.fixture(autouse=True)
def quiet():
    from transformers.utils import logging

    logging.disable_progress_bar()


def test_every_model_is_documented_and_present():
    readme = (FOLDER / "README.md").read_text()
    folders = {p.name for p in FOLDER.iterdir() if p.is_dir()}
    assert folders == set(demo.MODELS)
    assert all(f"`{name}`" in readme for name in folders)


@pytest.mark.parametrize("name", demo.MODELS)
def test_models_load_with_the_parameters_the_readme_states(name):
    model, tokenizer = demo.load(name)
    row = next(line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith(f"| `{name}`"))
    assert f"{sum(p.numel() for p in model.parameters()):,}" in row
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (tokenizer is None) == ("byte" in name or name == "llama-fixture")


def test_the_bard_reads_the_play_far_better_than_chance():
    model, tokenizer = demo.load("llama-bard")
    ids = torch.tensor(tokenizer(demo.text()).input_ids)[: 4 * 512].reshape(4, 512)
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 4.5  # a uniform guess among 1,024 tokens is 6.93 nats


def test_the_text_is_the_whole_play():
    play = demo.text()
    assert play.startswith("THE TEMPEST")
    assert "We are such stuff" in play and play.rstrip().endswith("Let your indulgence set me free.")


def test_an_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'llama-bard'"):
        demo.load("lama-bard")


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependency, match=r"pip install 'bnviz\[transformers\]'"):
        demo.load("llama-bard")


def test_no_file_of_a_model_names_a_machine():
    for file in FOLDER.rglob("*.json"):
        text = file.read_text()
        json.loads(text)
        assert not re.search(r'"(/(home|work|root|tmp|Users|mnt)/|[A-Z]:\\\\)', text), file

"""The magics in a real IPython shell, on real small models."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("IPython")

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import bnviz
from bnviz.errors import MissingDependency
from bnviz.jupyter import arguments, complete

MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2)).eval()
ids = torch.randint(0, 64, (2, 24))
"""


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    monkeypatch.delattr(builtins, "_", raising=False)  # a doctest leaves one, and IPython then keeps none of its own
    made = InteractiveShell.instance(colors="nocolor")
    made.run_line_magic("load_ext", "bnviz")
    yield made
    made.run_line_magic("unload_ext", "bnviz")
    made.history_manager.end_session()
    InteractiveShell.clear_instance()


@pytest.fixture
def watching(shell: InteractiveShell) -> InteractiveShell:
    assert shell.run_cell(MODEL).success
    return shell


def ran(shell: InteractiveShell, source: str) -> tuple[Any, Any]:
    """The result of a cell, and what it printed and displayed."""
    with capture_output() as said:
        result = shell.run_cell(source)
    return result, said


def slip(shell: InteractiveShell, source: str) -> str:
    """The message of a user's slip, checked to be shown in one line and to leave nothing attached."""
    result, said = ran(shell, source)
    assert isinstance(result.error_in_exec, UsageError)
    text = str(result.error_in_exec)
    assert said.stderr.strip() == f"UsageError: {text}"
    assert "Traceback" not in said.stdout
    return text


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ------------------------------------------------------------------------------------------------------------ %%bnviz


def test_cell_keeps_the_run_and_displays_the_report(watching: InteractiveShell) -> None:
    result, said = ran(watching, "%%bnviz model\nlogits = model(ids).logits\n")
    assert result.success
    run = watching.user_ns["run"]
    assert isinstance(run, bnviz.Run)
    assert {"attention", "activations"} <= set(run.kinds)
    assert run["attention"].sizes["layer"] == 2
    assert run["attention"].sizes["query"] == 48
    assert watching.user_ns["logits"].shape == (2, 24, 64)
    (output,) = said.outputs
    assert "bnviz-frame" in output.data["text/html"]
    assert output.data["text/plain"].startswith("Report on ")
    assert hooks(watching.user_ns["model"]) == 0


def test_cell_shows_its_last_value_as_any_cell_does(watching: InteractiveShell) -> None:
    result, _ = ran(watching, "%%bnviz -q\nmodel(ids).logits.shape\n")
    assert result.success
    assert watching.user_ns["_"] == (2, 24, 64)


def test_semicolon_keeps_the_last_value_quiet(watching: InteractiveShell) -> None:
    result, said = ran(watching, "%%bnviz -q\nmodel(ids).logits.shape;\n")
    assert result.success
    assert "torch.Size" not in said.stdout
    assert [output.data["text/plain"].split()[0] for output in said.outputs] == ["Run"]


def test_only_model_is_meant_when_none_is_named(watching: InteractiveShell) -> None:
    watching.run_cell("block = model.model.layers[0]; loss = torch.nn.CrossEntropyLoss(); same = model")
    result, _ = ran(watching, "%%bnviz -q -o mine -p attention\nmodel(ids)\n")
    assert result.success
    assert watching.user_ns["mine"].kinds == ("attention",)
    assert "run" not in watching.user_ns


def test_several_models_are_listed(watching: InteractiveShell) -> None:
    watching.run_cell("student = torch.nn.Linear(2, 2)")
    assert slip(watching, "%%bnviz\nmodel(ids)\n") == "Which model? Name one of: model, student."


def test_no_model(shell: InteractiveShell) -> None:
    assert slip(shell, "%%bnviz\npass\n").startswith("No model to watch")


def test_an_expression_names_a_model(watching: InteractiveShell) -> None:
    watching.run_cell('models = {"a": model}')
    result, _ = ran(watching, '%%bnviz models["a"] --quiet --budget "64 MiB"\nmodel(ids)\n')
    assert result.success
    assert watching.user_ns["run"].provenance["options"]["budget"] == "64 MiB"


def test_error_of_the_cell_is_its_own_and_the_run_until_then_is_kept(watching: InteractiveShell) -> None:
    result, said = ran(watching, "%%bnviz model\nmodel(ids)\ndef inner():\n    return 1 / 0\ninner()\n")
    assert isinstance(result.error_in_exec, ZeroDivisionError)
    assert "The cell failed; run holds what was seen until then." in said.stdout
    assert said.stdout.count("ZeroDivisionError: division by zero") == 1
    assert "line 5" in said.stdout  # the line of the cell as typed, with the magic as line 1
    assert "magics.py" not in said.stdout
    assert "run_cell_magic" not in said.stdout
    run = watching.user_ns["run"]
    assert run["attention"].sizes["query"] == 48
    assert any("ZeroDivisionError" in note for note in run.notes)
    assert hooks(watching.user_ns["model"]) == 0
    after, again = ran(watching, "try:\n    inner()\nexcept ZeroDivisionError as error:\n    print(repr(error))")
    assert after.success
    assert again.stdout.strip() == "ZeroDivisionError('division by zero')"


def test_error_before_the_model_ran_leaves_no_run(watching: InteractiveShell) -> None:
    result, said = ran(watching, "%%bnviz model\nraise KeyError('k')\n")
    assert isinstance(result.error_in_exec, KeyError)
    assert "there is no run" in said.stdout
    assert "run" not in watching.user_ns
    assert hooks(watching.user_ns["model"]) == 0


def test_interrupt_of_the_cell(watching: InteractiveShell) -> None:
    result, said = ran(watching, "%%bnviz model\nmodel(ids)\nraise KeyboardInterrupt\n")
    assert isinstance(result.error_in_exec, KeyboardInterrupt)
    assert "run holds what was seen" in said.stdout
    assert hooks(watching.user_ns["model"]) == 0


def test_cell_that_is_not_python_attaches_nothing(watching: InteractiveShell) -> None:
    result, said = ran(watching, "%%bnviz model\nmodel(\n")
    assert isinstance(result.error_in_exec, SyntaxError)
    assert type(result.error_in_exec).__name__ in said.stdout
    assert "run" not in watching.user_ns


def test_cell_that_never_calls_the_model(watching: InteractiveShell) -> None:
    assert slip(watching, "%%bnviz model\nx = 1\n").startswith("Nothing was captured: LlamaForCausalLM was not called")


def test_handlers_of_the_shell_are_put_back(watching: InteractiveShell) -> None:
    before = watching.custom_exceptions, watching.CustomTB
    ran(watching, "%%bnviz model\nraise ValueError\n")
    assert (watching.custom_exceptions, watching.CustomTB) == before


def test_magics_inside_the_cell(watching: InteractiveShell) -> None:
    result, said = ran(watching, "%%bnviz -q\n%%time\nmodel(ids)\n")
    assert result.success
    assert "Wall time" in said.stdout
    assert "run" in watching.user_ns


# ------------------------------------------------------------------------------------------------------------- %bnviz


def test_attach_status_detach(watching: InteractiveShell) -> None:
    _, said = ran(watching, "%bnviz attach model -p attention,activations")
    assert said.stdout.startswith("Watching model.")
    watching.run_cell("model(ids); model(ids)")
    _, said = ran(watching, "%bnviz status")
    assert "2 calls" in said.stdout
    assert "attention" in said.stdout
    assert slip(watching, "%bnviz attach model") == "model is watched already; %bnviz detach first."
    assert slip(watching, "%bnviz report").startswith("model is still watched; %bnviz detach first")
    result, _ = ran(watching, "%bnviz detach -o seen")
    assert result.result is watching.user_ns["seen"]
    assert watching.user_ns["seen"]["attention"].sizes["step"] == 2
    assert hooks(watching.user_ns["model"]) == 0
    _, said = ran(watching, "%bnviz status")
    assert said.stdout.startswith("Nothing is watched.")


def test_report_is_shown_or_written(watching: InteractiveShell, tmp_path: Any) -> None:
    ran(watching, "%%bnviz -q\nmodel(ids)\n")
    result, _ = ran(watching, "%bnviz report")
    assert isinstance(result.result, bnviz.Report)
    target = tmp_path / "out.html"
    _, said = ran(watching, f"%bnviz report {target}")
    assert target.stat().st_size > 100_000
    assert said.stdout.startswith(str(target))
    assert re.search(r" · [\d.]+ [KM]iB$", said.stdout.strip())
    ran(watching, f"%bnviz report {target}")  # its own is replaced
    assert target.stat().st_size > 100_000
    target.write_text("as it was")
    assert "was not written by bnviz and is left alone" in slip(watching, f"%bnviz report {target}")
    assert target.read_text() == "as it was"
    assert "is not named as a web page" in slip(watching, f"%bnviz report {tmp_path / 'out.pdf'}")


def test_sites(watching: InteractiveShell) -> None:
    result, _ = ran(watching, "%bnviz sites model")
    assert "model.layers.0" in repr(result.result)
    assert "self_attn" in result.result._repr_html_()


def test_unload_detaches(watching: InteractiveShell) -> None:
    ran(watching, "%bnviz attach model")
    assert hooks(watching.user_ns["model"]) > 0
    watching.run_line_magic("unload_ext", "bnviz")
    assert hooks(watching.user_ns["model"]) == 0
    assert "bnviz" not in watching.magics_manager.magics["line"]
    assert "bnviz" not in watching.magics_manager.magics["cell"]
    watching.run_line_magic("load_ext", "bnviz")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("%bnviz attach nothing", r"nothing: NameError: name 'nothing' is not defined. Models here: model."),
        ("%bnviz attach ids", r"ids is a Tensor, expected a torch.nn.Module. Models here: model."),
        ("%bnviz attach", r"The following arguments are required: MODEL. See: %bnviz help"),
        ("%bnviz frobnicate", r"Argument attach\|detach\|.*invalid choice: 'frobnicate'"),
        ("%bnviz attach model -p atention", r"unknown probe 'atention'; valid: .*attention"),
        ("%bnviz attach model --budget lots", r"budget='lots': expected bytes or a text like '512 MiB'"),
        ("%bnviz detach", r"Nothing is watched. Attach a model: %bnviz attach MODEL"),
        ("%bnviz report", r"No run is called run. Make one with %%bnviz MODEL"),
        ("%%bnviz -o 2x\nmodel(ids)", r"'2x' is not a variable's name"),
        ("%%bnviz -o class\nmodel(ids)", r"'class' is not a variable's name"),
        ('%%bnviz "model\nmodel(ids)', r"No closing quotation in '\"model'"),
        ("%%bnviz model -p routing\nmodel(ids)", r"routing: no router found in LlamaForCausalLM"),
    ],
)
def test_slips_are_one_line(watching: InteractiveShell, source: str, message: str) -> None:
    import re

    assert re.search(message, slip(watching, source))
    assert hooks(watching.user_ns["model"]) == 0


def test_help_names_every_action(shell: InteractiveShell) -> None:
    _, said = ran(shell, "%bnviz help")
    assert all(f"%bnviz {action}" in said.stdout for action in arguments.ACTIONS if action != "help")
    _, bare = ran(shell, "%bnviz")
    assert bare.stdout == said.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%bnviz a", ["attach"]),
        ("%bnviz ", ["attach", "detach", "status", "report", "compare", "sites", "panel", "help"]),
        ("%bnviz attach ", ["model", "student"]),
        ("%%bnviz m", ["model"]),
        ("%%bnviz model -p attention,rou", ["attention,routing"]),
        ("%%bnviz model --b", ["--budget"]),
        ("%bnviz detach --o", ["--output"]),
        ("%bnviz status ", []),
    ],
)
def test_completion(watching: InteractiveShell, text: str, expected: list[str]) -> None:
    watching.run_cell("student = torch.nn.Linear(2, 2)")
    assert complete.choices(text, watching.user_ns) == expected


def test_completion_reaches_the_shell(watching: InteractiveShell) -> None:
    from IPython.core.completer import provisionalcompleter

    with provisionalcompleter():
        found = [one.text for one in watching.Completer.completions("%bnviz att", 10)]
    assert "attach" in found


def test_loading_is_light() -> None:
    code = (
        "import sys, time; from IPython.core.interactiveshell import InteractiveShell as S; s = S();"
        "t = time.perf_counter(); s.run_line_magic('load_ext', 'bnviz'); t = time.perf_counter() - t;"
        "print(t, sorted({'torch', 'bokeh', 'xarray', 'zarr', 'numpy', 'anywidget'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = done.stdout.strip().split(" ", 1)
    assert float(seconds) < 0.5
    assert loaded == "[]"


@pytest.mark.parametrize("package", ["anywidget", "traitlets"])
def test_a_live_view_without_its_package_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bnviz.jupyter

    monkeypatch.delitem(sys.modules, "bnviz.jupyter.widget", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingDependency, match=rf"needs '{package}', which is not installed; run: pip install 'bnviz\[jupyter\]'"
    ):
        bnviz.jupyter.View  # noqa: B018

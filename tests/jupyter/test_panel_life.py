"""How the link of the side panel begins and ends: loading, taking back, loading again, a new kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ipykernel")

from .kernels import Heard, Kernel, Window

THREADS = "import threading; print([one.name for one in threading.enumerate() if one.name == 'bnviz-panel'])"


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    made = Kernel(tmp_path)
    yield made
    made.stop()


def session(said: list[Heard]) -> str:
    """That of the one link that was opened."""
    (opened,) = (one for one in said if one.kind == "comm_open")
    assert opened.says("hello")
    return str(opened.data["session"])


def test_taken_back_it_closes_its_comms_and_ends_its_thread(kernel: Kernel) -> None:
    first = session(kernel.run("%load_ext bnviz"))
    window, gone = Window(kernel), Window(kernel)
    assert window.hello()["session"] == first
    gone.hello()
    gone.close()
    kernel.run("import torch\nnet = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())")
    window.answer("watch", model="net")
    kernel.state(lambda state: state["watching"] is not None and not state["watching"]["waiting"])
    assert kernel.printed(THREADS).strip() == "['bnviz-panel']"
    said = kernel.run("%unload_ext bnviz")
    assert {one.comm for one in said if one.kind == "comm_close"} == {f"bnviz-{first}", window.comm}
    assert kernel.printed(THREADS).strip() == "[]"
    assert kernel.printed("print(len(net._forward_hooks), len(net._forward_pre_hooks))").strip() == "0 0"
    late = Window(kernel)
    late.closed()  # nobody is there
    said = kernel.run("net(torch.ones(1, 2))")
    assert not any(one.kind.startswith("comm") for one in said)
    assert session(kernel.run("%load_ext bnviz")) != first


def test_nothing_is_said_on_a_comm_that_was_closed(kernel: Kernel) -> None:
    """The thread that speaks has ended before the comm is closed."""
    kernel.run("import torch\nnet = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())")
    for _ in range(3):
        kernel.run("%load_ext bnviz\n%bnviz attach net")
        kernel.run("net(torch.ones(1, 2))\n%unload_ext bnviz")
    kernel.run("import threading")
    closed = set[str]()
    for one in kernel.heard:
        assert one.comm not in closed or one.comm == ""
        if one.kind == "comm_close":
            closed.add(one.comm)
    assert len(closed) == 3


def test_loading_twice_is_loading_once(kernel: Kernel) -> None:
    kernel.run("%load_ext bnviz")
    said = kernel.run("%load_ext bnviz\nimport bnviz; bnviz.load_ipython_extension(get_ipython())")
    assert not any(one.kind == "comm_open" for one in said)
    assert kernel.printed(THREADS).strip() == "['bnviz-panel']"


def test_a_restarted_kernel_is_another_session(kernel: Kernel) -> None:
    first = session(kernel.run("%load_ext bnviz"))
    kernel.restart()
    window = Window(kernel)
    window.closed()  # bnviz is not loaded there
    second = session(kernel.run("%load_ext bnviz"))
    assert second != first
    again = Window(kernel)
    assert again.hello()["session"] == second


def test_loaded_by_a_profile_the_link_comes_with_the_first_cell(kernel: Kernel) -> None:
    profile = kernel.folder / "ipython" / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_config.py").write_text("c.InteractiveShellApp.extensions = ['bnviz']")
    kernel.restart()
    assert session(kernel.run("%load_ext bnviz"))  # what the panel's button does
    said = kernel.run("1")
    assert not any(one.kind == "comm_open" for one in said)
    assert kernel.printed(THREADS).strip() == "['bnviz-panel']"


def test_without_torch_there_is_nothing_to_watch_and_nothing_is_imported(kernel: Kernel) -> None:
    kernel.run("%load_ext bnviz")
    window = Window(kernel)
    window.hello()
    state = kernel.state()
    assert (state["models"], state["runs"], state["probes"], state["watching"]) == ([], [], [], None)
    assert window.refusal("watch", model="model") == "Unknown model 'model'. Valid: none."
    loaded = kernel.printed("import sys; print([name for name in ('torch', 'bokeh', 'numpy') if name in sys.modules])")
    assert loaded.strip() == "[]"

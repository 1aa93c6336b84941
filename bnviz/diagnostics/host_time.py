"""Where the host's time goes: Python functions and lines by sampled time, by thread, with and without the interpreter lock."""

from __future__ import annotations

import numpy as np
import xarray as xr

from bnviz.quantities import counted, duration, share
from bnviz.schema import Finding, Judgement, Saving, Variable, diagnostic, stamp

from ._call_tree import inclusive, merged, subtree
from ._host_reading import Reading

PLUMBING = frozenset(
    {"_wrapped_call_impl", "_call_impl", "__call__", "inner", "wrapper", "wrapped", "wrapped_func", "wrapped_fn", "_fn"}
    | {"decorate_context"}
)
_FUNCTION = ("function",)
_THREAD = ("thread",)
_LINE = ("frame",)
_EVENT = ("event",)


@diagnostic(
    question="What does the host do, and is it Python that holds the model back?",
    needs=("host.samples", "host.gil_samples", "host.leaf", "host.parent"),
    gives=(
        Variable("function_name", _FUNCTION, "name", "Python function, most self time first; 'bnviz' is what watches"),
        Variable("function_file", _FUNCTION, "name", "its file"),
        Variable("function_line", _FUNCTION, "id", "its line with the most self time; -1: none known"),
        Variable("self_time", _FUNCTION, "s", "time in the function itself, operators it calls included"),
        Variable("inclusive_time", _FUNCTION, "s", "time in it and in all Python it calls; recursion counts once"),
        Variable("gil_time", _FUNCTION, "s", "self time in which it held the GIL: Python, not an operator"),
        Variable("self_samples", _FUNCTION, "count", "samples behind `self_time`"),
        Variable("thread_name", _THREAD, "name", "thread, most time first"),
        Variable("running_time", _THREAD, "s", "time the thread was running or ready to run"),
        Variable("thread_gil_time", _THREAD, "s", "time it held the GIL"),
        Variable("asleep_time", _THREAD, "s", "rest of the time; NaN when sleeping threads were sampled too"),
        Variable("thread_samples", _THREAD, "count", "samples behind `running_time`"),
        Variable("self_time_by_thread", (*_FUNCTION, *_THREAD), "s", "`self_time` in each thread"),
        Variable("gil_time_by_thread", (*_FUNCTION, *_THREAD), "s", "`gil_time` in each thread"),
        Variable("line_function", _LINE, "id", "row of `function_...` a line belongs to; most self time first"),
        Variable("line_number", _LINE, "id", "the line"),
        Variable("line_time", _LINE, "s", "time in the line itself, operators it calls included"),
        Variable("line_inclusive_time", _LINE, "s", "time in the line and in all Python it calls"),
        Variable("call_function", _EVENT, "id", "row of `function_...` of a chain of calls, callers before callees"),
        Variable("call_parent", _EVENT, "id", "the caller's row, -1 where a thread begins"),
        Variable("call_thread", _EVENT, "id", "row of `thread_...`"),
        Variable("call_time", _EVENT, "s", "time in the chain and below it"),
    ),
    order=70,
)
def host_time(host: xr.Dataset) -> xr.Dataset:
    """Time by Python function, line and thread from sampled stacks, and the part of it that holds the interpreter lock.

    `self_time` of a function that calls operators is the operators' time. `gil_time` near `self_time`: Python itself is at
    work; near 0: the lock is released and an operator, a copy or a wait is.

    Parameters
    ----------
    host : Dataset
        The record of the probe `host`: a calling-context tree with counts.

    Returns
    -------
    Dataset
        Dims function, frame (a line), thread and event (a chain of calls, siblings of one function merged). Seconds are
        samples times the sampling interval. In the chains of calls, functions that only hand a call on (`Module._call_impl`,
        decorators of packages) are folded into their caller. `attrs`: `model`, `wall` [s], `interval` [s], `samples`,
        `failed_share` of the samples that could not be read (NaN without time), `idle` whether sleeping threads were sampled.

    Notes
    -----
    With n samples a time is n x interval with a standard error of sqrt(n) x interval (moments are drawn at random, so counts
    are Poisson); a share p of n samples has sqrt(p (1 - p) / n). `gil_time` comes from a second sampler and may exceed
    `self_time` by chance. Cost: O(chains of calls x depth).

    Examples
    --------
    >>> table = {"thread_name": ["MainThread"], "frame_function": ["step", "load"], "frame_file": ["net.py"]}
    >>> columns = {"leaf": [0, 1], "parent": [-1, 0], "thread_name": [0, 0], "samples": [10, 30], "gil_samples": [10, 3]}
    >>> host = xr.Dataset({k: ("event", v) for k, v in columns.items()})
    >>> for name, values in (("frame_function", [0, 1]), ("frame_file", [0, 0]), ("frame_line", [4, 9])):
    ...     host[name] = ("frame", values)
    >>> for name, words in table.items():
    ...     host[name].attrs["table"] = words
    >>> host["interval"], host["wall"], host["failed"] = 0.01, 0.5, 0
    >>> result = host_time(host)
    >>> result["self_time"].values.tolist(), result["inclusive_time"].values.tolist()
    ([0.3, 0.1], [0.3, 0.4])
    """
    interval, wall = float(host["interval"]), float(host["wall"])
    tree = _Tree(host)
    result = xr.Dataset()
    function_order = _functions(result, tree, interval)
    thread_order = _threads(result, tree, interval, wall, bool(host.attrs.get("host_idle", False)))
    _lines(result, tree, interval, function_order)
    cell = (_positions(function_order)[tree.function], _positions(thread_order)[tree.thread])
    for name, counts in (("self_time_by_thread", tree.samples), ("gil_time_by_thread", tree.gil)):
        table = np.zeros((len(function_order), len(thread_order)))
        np.add.at(table, cell, counts * interval)
        result[name] = (("function", "thread"), table)
    parent, group, thread, own = merged(tree.parent, tree.function, tree.thread, tree.samples, tree.plumbing)
    result["call_function"] = ("event", _positions(function_order)[group].astype(np.int32))
    result["call_parent"] = ("event", parent.astype(np.int32))
    result["call_thread"] = ("event", _positions(thread_order)[thread].astype(np.int32))
    result["call_time"] = ("event", subtree(parent, own) * interval)
    expected = wall / interval if interval > 0 else 0.0
    result.attrs = {
        "model": str(host.attrs.get("model", "")),
        "wall": wall,
        "interval": interval,
        "samples": int(tree.samples.sum()),
        "failed_share": min(1.0, float(host["failed"]) / expected) if expected > 0 else float("nan"),
        "idle": bool(host.attrs.get("host_idle", False)),
    }
    return stamp(result, host_time.spec.gives)  # type: ignore[attr-defined]


class _Tree:
    """The record as plain arrays; frames grouped to functions by name and file."""

    def __init__(self, host: xr.Dataset) -> None:
        self.parent, self.frame = host["parent"].values.astype(np.int64), host["leaf"].values.astype(np.int64)
        self.samples, self.gil = host["samples"].values.astype(np.int64), host["gil_samples"].values.astype(np.int64)
        self.threads = [str(name) for name in host["thread_name"].attrs.get("table", ())]
        self.thread = host["thread_name"].values.astype(np.int64)
        names, files = (host[f"frame_{what}"].attrs.get("table", ()) for what in ("function", "file"))
        self.line = host["frame_line"].values.astype(np.int64)
        pairs = zip(host["frame_function"].values.tolist(), host["frame_file"].values.tolist(), strict=True)
        keys = [(str(names[int(n)]), str(files[int(f)])) for n, f in pairs]
        index = {key: at for at, key in enumerate(dict.fromkeys(keys))}
        self.functions = list(index)
        self.function_of_frame = np.array([index[key] for key in keys], np.int64)
        self.function = self.function_of_frame[self.frame]
        self.plumbing = np.array([_is_plumbing(*key) for key in self.functions], bool)[self.function]


def _is_plumbing(name: str, file: str) -> bool:
    """Whether a function only hands a call on: `Module.__call__` and decorators of packages."""
    return "/" in file and not file.startswith("/") and name.rpartition(".")[2] in PLUMBING


def _order(time: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Rows by `time`, ties by `more`, largest first."""
    return np.lexsort((-more, -time))


def _positions(order: np.ndarray) -> np.ndarray:
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return place


def _functions(result: xr.Dataset, tree: _Tree, interval: float) -> np.ndarray:
    number = len(tree.functions)
    own = np.bincount(tree.function, tree.samples, minlength=number)
    whole = inclusive(tree.parent, tree.function, tree.samples, number)
    held = np.bincount(tree.function, tree.gil, minlength=number)
    order = _order(own, whole)
    by_frame = np.bincount(tree.frame, tree.samples, minlength=len(tree.line))
    lines = np.zeros(number, np.int64)
    by_frame[tree.line < 0] = -1  # not known: only where no other line is
    for frame in np.lexsort((-tree.line, by_frame)):  # the last written wins: most samples, then the smallest line
        lines[tree.function_of_frame[frame]] = tree.line[frame]
    for what, position in (("name", 0), ("file", 1)):
        words = [tree.functions[at][position] for at in order]
        table = {word: i for i, word in enumerate(dict.fromkeys(words))}
        result[f"function_{what}"] = ("function", np.array([table[word] for word in words], np.int32))
        result[f"function_{what}"].attrs["table"] = list(table)
    result["function_line"] = ("function", lines[order].astype(np.int32))
    result["self_time"], result["inclusive_time"] = (
        ("function", own[order] * interval),
        ("function", whole[order] * interval),
    )
    result["gil_time"] = ("function", held[order] * interval)
    result["self_samples"] = ("function", own[order].astype(np.int64))
    return order


def _threads(result: xr.Dataset, tree: _Tree, interval: float, wall: float, idle: bool) -> np.ndarray:
    number = len(tree.threads)
    seen = np.bincount(tree.thread, tree.samples, minlength=number)
    held = np.bincount(tree.thread, tree.gil, minlength=number)
    order = _order(seen, held)
    result["thread_name"] = ("thread", np.arange(number, dtype=np.int32))
    result["thread_name"].attrs["table"] = [tree.threads[at] for at in order]
    result["running_time"] = ("thread", seen[order] * interval)
    result["thread_gil_time"] = ("thread", held[order] * interval)
    asleep = np.full(number, np.nan) if idle else np.maximum(wall - seen[order] * interval, 0.0)
    result["asleep_time"] = ("thread", asleep)
    result["thread_samples"] = ("thread", seen[order].astype(np.int64))
    return order


def _lines(result: xr.Dataset, tree: _Tree, interval: float, function_order: np.ndarray) -> None:
    number = len(tree.line)
    own = np.bincount(tree.frame, tree.samples, minlength=number)
    whole = inclusive(tree.parent, tree.frame, tree.samples, number)
    order = _order(own, whole)
    result["line_function"] = ("frame", _positions(function_order)[tree.function_of_frame[order]].astype(np.int32))
    result["line_number"] = ("frame", tree.line[order].astype(np.int32))
    result["line_time"], result["line_inclusive_time"] = (
        ("frame", own[order] * interval),
        ("frame", whole[order] * interval),
    )


# ------------------------------------------------------------------------------------------------------------------- judge
def judge(
    result: xr.Dataset,
    *,
    python: float = 0.3,
    hot: float = 0.1,
    asleep: float = 0.3,
    watching: float = 0.05,
    enough: int = 50,
) -> Judgement:
    """Names the Python functions that hold the interpreter lock, and says when the host sleeps or watching costs much.

    The thread judged is the main thread, the busiest where that was not seen. What bnviz itself took is left out of all shares
    but its own.

    Parameters
    ----------
    result : Dataset
        From `host_time`.
    python : float
        Share of the thread's running time with the GIL held from which the host is called Python-bound; twice that is high.
    hot : float
        Share of it that one function must hold the GIL for to be named.
    asleep : float
        Share of the wall time the thread sleeps that is worth a note; as long as other threads run for bnviz it is taken to
        wait for them, which is no sleep of the model's.
    watching : float
        Share of its time spent in bnviz, or waiting for it, that is worth a note.
    enough : int
        Samples of the thread below which nothing is claimed: 50 leave an error of 14 % of a time.

    Notes
    -----
    A share is claimed when it passes its limit by two standard errors of its count of samples. What removing a function would
    save is at most the time it held the GIL; where a device works meanwhile it may be nothing.
    """
    seen = Reading(result)
    findings = _watching(seen, watching)
    if seen.samples >= enough:
        findings = [*_python_bound(seen, python), *_hot(seen, hot), *_asleep(seen, asleep), *findings]
    title = _title(seen, python, enough)
    threads = result.sizes["thread"]
    subtitle = (
        f"time by Python function, from sampled stacks · {seen.attrs.get('model') or 'model'} · "
        f"{counted(seen.attrs['samples'], 'sample')} of {counted(threads, 'thread')} in {duration(seen.wall)}"
    )
    caveats = _caveats(seen, enough)
    summary = f"Host time: {title}. {' '.join(f'{c}.' for c in caveats)}"
    return Judgement(title, subtitle, summary, caveats, tuple(findings))


def _python_bound(seen: Reading, limit: float) -> list[Finding]:
    part = seen.of_running(seen.held)
    if not seen.surely(seen.held, limit):
        return []
    return [
        Finding(
            "host_time/python_bound",
            f"{seen.thread} holds the GIL for {share(part)} of its {seen.time_words} (limit {share(limit)}): "
            "the host runs Python while operators wait",
            "high" if part >= 2 * limit else "medium",
            {"thread": seen.thread},
            part,
            limit,
            advice="Give operators more to do a call, or fuse them: compare with torch.compile(model) or a larger batch.",
        )
    ]


def _hot(seen: Reading, limit: float) -> list[Finding]:
    """At most three functions whose own Python takes long."""
    found = []
    for at in np.argsort(-seen.gil_time, kind="stable")[:3]:
        held = float(seen.gil_time[at])
        if not seen.surely(held, limit):
            continue
        place = seen.place(int(at))
        found.append(
            Finding(
                "host_time/hot_function",
                f"{share(seen.of_running(held))} of {seen.thread}'s {seen.time_words} is Python in {place} "
                f"(limit {share(limit)})",
                "medium",
                {"thread": seen.thread, "function": place},
                seen.of_running(held),
                limit,
                advice=f'Vectorise {seen.line(int(at))} or move it out of the step, then capture again with probes=["host"].',
                saving=Saving(
                    held, "s", held / seen.wall, "sampled; at most this, less where a device works meanwhile"
                ),
            )
        )
    return found


def _asleep(seen: Reading, limit: float) -> list[Finding]:
    part = seen.asleep / seen.wall if seen.wall > 0 else float("nan")
    if not part >= limit:
        return []
    return [
        Finding(
            "host_time/asleep",
            f"{seen.thread} sleeps {share(part)} of the {duration(seen.wall)} watched: it waits for data, a lock or a device, "
            "or had nothing to do",
            "note",
            {"thread": seen.thread},
            part,
            limit,
            advice='See where it waits: bnviz.capture(model, probes=["host"], host_idle=True).',
        )
    ]


def _watching(seen: Reading, limit: float) -> list[Finding]:
    part = seen.share_watching()
    spent = seen.watching + seen.waiting
    if not (part >= limit and spent >= 10 * seen.interval):
        return []
    waits = f", {share(seen.waiting / spent)} of it waiting for its helper" if seen.waiting else ""
    return [
        Finding(
            "host_time/watching",
            f"bnviz itself takes {share(part)} of {seen.thread}'s time{waits} (limit {share(limit)}); it is in no other share",
            "note",
            {"thread": seen.thread},
            part,
            limit,
            advice="For times alone watch less: name probes=[...], or every=10 for one forward in ten.",
        )
    ]


def _title(seen: Reading, python: float, enough: int) -> str:
    if seen.samples < enough:
        return f"Too few samples to say where the host's time goes: {seen.samples}, needs {enough}"
    bound = seen.surely(seen.held, python)
    of = seen.gil_time if bound else seen.self_time
    top = int(np.argmax(of))
    if bound:
        said = (
            f"{seen.short_thread} holds the GIL {share(seen.of_running(seen.held))} of its {seen.time_words}, most in "
        )
    else:
        said = f"{share(seen.of_running(float(of[top])))} of {seen.short_thread}'s {seen.time_words} is in "
    return said + seen.place(top, 90 - len(said))


def _caveats(seen: Reading, enough: int) -> tuple[str, ...]:
    said = []
    if seen.samples < enough:
        who = seen.thread or "any thread"
        said.append(f"Needs at least {enough} samples of {who}, has {seen.samples}: watch the model for longer")
    else:
        error = 2 * 0.5 / seen.samples**0.5
        said.append(
            f"Sampled: a share of half of {seen.thread} is known to ±{100 * error:.1f} points (two standard errors), "
            f"a time of n samples to ±√n; {duration(seen.interval)} a sample"
        )
    said.append(
        "A line that calls an operator holds the operator's time; time with the GIL comes from a second sampler"
    )
    if not seen.attrs["idle"]:
        said.append(
            "Threads asleep (waiting for data, a lock or the GIL) are not in it; a device waited for in a spin is"
        )
    failed = float(seen.attrs["failed_share"])
    if failed > 0.01:
        said.append(
            f"{share(failed)} of the samples could not be read whole, as the stack changed meanwhile; times are low by that "
            "at most"
        )
    return tuple(said)

"""py-spy beside this process: started, waited for, stopped and, whatever happens, ended.

py-spy reads the interpreter's memory from another process. With `--nonblocking` it never stops a thread of ours, so what it
costs is a little of another core; a read that falls into a change of the stack is dropped and counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnviz.errors import BnvizError, missing

READY = 2.0  # seconds: py-spy needs about 0.02, 0.5 on a cold disk
FINISH = 10.0  # seconds to write its file: about 0.05 for a minute of samples
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_PR_SET_PTRACER = 0x59616D61
_ANYONE = ctypes.c_ulong(-1).value  # two recorders, and the kernel remembers one process only
_DENIED = "Permission Denied"
_BEGUN = "Sampling process"
_ERRORS = re.compile(r"Errors: (\d+)")


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one recorder left behind.

    Parameters
    ----------
    text : str
        The speedscope file.
    failed : int
        Reads that were dropped.
    """

    text: str
    failed: int


def executable() -> str:
    """Where py-spy is: beside this interpreter, else on the path.

    Raises
    ------
    MissingDependency
        It is not installed.
    """
    found = shutil.which("py-spy", path=sysconfig.get_path("scripts")) or shutil.which("py-spy")
    if found is None:
        raise missing("py-spy", "host", "sampling Python stacks")
    return found


def trial() -> None:
    """Read this process's stacks once; raises the error that `Sampler.start` would raise. About 0.05 s."""
    command = [executable(), "dump", "--nonblocking", "--pid", str(os.getpid())]
    with _traceable():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=FINISH, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BnvizError(f"py-spy did not run ({error}); run it by hand: {' '.join(command)}") from error
    if done.returncode:
        raise _refusal(done.stdout + done.stderr)


class Sampler:
    """py-spy processes that record this one, one for each set of extra arguments; `start`, then `stop`.

    Parameters
    ----------
    recorders : mapping of str to sequence of str
        Name to extra arguments of `py-spy record`.
    rate : int
        Samples a second.
    seconds : int
        After which a recorder ends by itself.

    Notes
    -----
    They run in a session of their own, so that an interrupt meant for the model does not reach them, and end when this process
    ends. If `stop` is never called they are killed when the Sampler is collected or the interpreter exits. Where Yama forbids a
    child to read its parent (`ptrace_scope` 1) this process permits it while they run, and takes the permission back.
    """

    def __init__(self, recorders: Mapping[str, Sequence[str]], *, rate: int, seconds: int) -> None:
        self._wanted, self._rate, self._seconds = {n: tuple(a) for n, a in recorders.items()}, rate, seconds
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._folder: Path | None = None
        self._kill: weakref.finalize[..., Sampler] | None = None
        self._stack = contextlib.ExitStack()
        self._began = 0.0

    def start(self) -> None:
        """Start the recorders and wait, for at most `READY` seconds, until they sample.

        Raises
        ------
        MissingDependency
            py-spy is not installed.
        BnvizError
            It may not read this process, or does not run here; the sentence says what to do.
        """
        if sys.platform == "win32":
            raise BnvizError(
                "Host sampling needs Linux or macOS: elsewhere py-spy cannot be told to stop; capture without the probe host."
            )
        program = executable()
        self._folder = Path(tempfile.mkdtemp(prefix="bnviz-host-"))
        self._kill = weakref.finalize(self, _end, self._running, self._folder, os.getpid())
        self._stack.enter_context(_traceable())
        try:
            for name, extra in self._wanted.items():
                self._running[name] = self._launch(program, name, extra)
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise
        self._began = time.perf_counter()

    def _launch(self, program: str, name: str, extra: Sequence[str]) -> subprocess.Popen[bytes]:
        command = [program, "record", "--nonblocking", "--full-filenames", "--format", "speedscope"]
        command += ["--rate", str(self._rate), "--duration", str(self._seconds), "--pid", str(os.getpid())]
        command += ["--output", str(self._file(name, "json")), *extra]
        with self._file(name, "log").open("wb") as log:
            try:
                return subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                raise BnvizError(
                    f"py-spy at {program} did not start ({error}); reinstall it: pip install py-spy"
                ) from error

    def _wait_until_ready(self) -> None:
        deadline = time.perf_counter() + READY
        for name, process in self._running.items():
            while _BEGUN not in self._log(name) and time.perf_counter() < deadline:
                if process.poll() is not None:
                    raise _refusal(self._log(name))
                time.sleep(0.002)

    def stop(self) -> tuple[dict[str, Recorded], float]:
        """End the recorders; what each recorded, and for how many seconds they sampled.

        Raises
        ------
        BnvizError
            A recorder ended early, or did not write its file within `FINISH` seconds.
        """
        lasted = min(time.perf_counter() - self._began, float(self._seconds))
        try:
            for process in self._running.values():
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            deadline = time.perf_counter() + FINISH
            return {name: self._finish(name, process, deadline) for name, process in self._running.items()}, lasted
        finally:
            self.kill()

    def _finish(self, name: str, process: subprocess.Popen[bytes], deadline: float) -> Recorded:
        try:
            process.wait(max(deadline - time.perf_counter(), 0.01))
        except subprocess.TimeoutExpired:
            raise BnvizError(
                f"py-spy did not write its samples within {FINISH:.0f} s and was ended; sample less with host_rate=20."
            ) from None
        log, file = self._log(name), self._file(name, "json")
        if process.returncode != 0:
            raise _refusal(log)
        if not file.exists():
            raise BnvizError(
                "py-spy ended before it took a sample; let the model run longer than 0.3 s inside the capture."
            )
        failed = _ERRORS.search(log)
        return Recorded(file.read_text(encoding="utf-8", errors="replace"), int(failed[1]) if failed else 0)

    def kill(self) -> None:
        """End the recorders now and remove their files; again: nothing."""
        if self._kill is not None:
            self._kill()
        self._stack.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the recorders that have not ended."""
        return tuple(p.pid for p in self._running.values() if p.poll() is None)

    def _file(self, name: str, kind: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.{kind}"

    def _log(self, name: str) -> str:
        return self._file(name, "log").read_text(encoding="utf-8", errors="replace")


def _end(running: Mapping[str, subprocess.Popen[bytes]], folder: Path, owner: int) -> None:
    """Kill what runs and remove its files; in a fork of the process that started it, nothing."""
    if os.getpid() != owner:
        return
    for process in running.values():
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _traceable() -> Iterator[None]:
    """While it lasts, a child may read this process even where Yama lets only a parent read its children."""
    if not (sys.platform.startswith("linux") and _scope() == 1):
        yield
        return
    allow = ctypes.CDLL(None, use_errno=True).prctl
    arguments = [ctypes.c_ulong(0)] * 3
    allow(ctypes.c_int(_PR_SET_PTRACER), ctypes.c_ulong(_ANYONE), *arguments)
    try:
        yield
    finally:
        allow(ctypes.c_int(_PR_SET_PTRACER), ctypes.c_ulong(0), *arguments)


def _scope() -> int:
    try:
        return int(_YAMA.read_text())
    except (OSError, ValueError):
        return 0


def _refusal(said: str) -> BnvizError:
    """The sentence for what py-spy printed when it gave up."""
    if _DENIED not in said and "requires root" not in said:
        line = next(
            (x.strip() for x in said.splitlines() if "rror" in x), said.strip().splitlines()[-1:] or "no message"
        )
        return BnvizError(
            f"py-spy could not sample this process ({line}); try it by hand: py-spy dump --pid {os.getpid()}"
        )
    if sys.platform == "darwin":
        what = "macOS lets only root read another process; start Python with sudo -E"
    elif _scope() >= 2:
        what = "an administrator set ptrace_scope to 2 or 3 and must lower it: sudo sysctl kernel.yama.ptrace_scope=1"
    elif Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        what = "start the container with --cap-add SYS_PTRACE"
    elif _scope() == 1:
        what = "run: sudo sysctl kernel.yama.ptrace_scope=0"
    else:
        what = "start Python with sudo -E, or as the user who may trace it"
    return BnvizError(f"Host sampling is not permitted: py-spy may not read this process; {what}.")

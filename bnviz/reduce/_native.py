"""Passes written in C for the CPU: compiled once a machine by the C compiler that is there, loaded where that worked.

A library is kept in the user's cache directory under a name made of its source, the compiler and the processor, so that another
machine with the same home makes its own. Compiling takes a fraction of a second; without a compiler, or with
`BNVIZ_KERNELS=off`, the plain reduction runs and gives the same numbers, slower. One log line says which and why.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from ._dispatch import mode

_log = logging.getLogger("bnviz.kernels")
SOURCES = Path(__file__).parent / "native"
COMPILERS = ("cc", "gcc", "clang")
# Nothing that lets sums be reordered or values be taken as finite, and nothing that is linked: gcc's -ffast-math would make a
# library that switches subnormal numbers off in the whole process.
FLAGS = ("-O3", "-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-w")
LIBRARIES = ("-lm",)
HERE = ("-march=native",)  # of the processor that compiles; the architecture is in the library's name
SECONDS = 60.0
RESULTS = {
    "block_pass": ("block_pass", "block_end"),
    "attention_strip": ("attention_strip",),
}  # functions that return an int64_t


def library(name: str) -> ctypes.CDLL | None:
    """The library of `native/<name>.c`; None where it can't be had, or is not wanted."""
    return None if _off(os.environ.get("BNVIZ_KERNELS")) else _loaded(name)


@cache
def _off(_: str | None) -> bool:
    return mode() == "off"


def obstacle(name: str) -> str:
    """Why the library can't be had; "" when it can."""
    try:
        _ready(name)
    except (OSError, subprocess.SubprocessError, LookupError) as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return ""


@cache
def _loaded(name: str) -> ctypes.CDLL | None:
    if reason := obstacle(name):
        _log.info("%s on cpu: plain (%s)", name, reason)
        return None
    found = _ready(name)
    _log.info("%s on cpu: compiled C (%s)", name, found._name)
    return found


@cache
def _ready(name: str) -> ctypes.CDLL:
    """Load the library, compiled now if it is not there yet."""
    compiler = _compiler()
    sources = [*SOURCES.glob(f"{name}.c"), *SOURCES.glob("*.h")]
    text = b"".join(path.read_bytes() for path in sorted(sources))
    mark = hashlib.sha256(b"\0".join((text, repr((compiler, FLAGS, _processor())).encode()))).hexdigest()[:16]
    target = _folder() / f"{name}-{mark}.so"
    if not target.exists():
        _compile(compiler, SOURCES / f"{name}.c", target)
    found = ctypes.CDLL(str(target))
    for function in RESULTS.get(name, ()):
        getattr(found, function).restype = ctypes.c_int64
    return found


def _compiler() -> list[str]:
    """The command of the C compiler; the environment's CC first."""
    if sys.platform == "win32":
        raise LookupError("C is compiled on Linux and macOS only")
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen and shutil.which(chosen[0]):
        return chosen
    for one in COMPILERS:
        if path := shutil.which(one):
            return [path]
    raise LookupError(f"no C compiler: none of {', '.join(COMPILERS)} is on the path and CC names none")


def _compile(compiler: list[str], source: Path, target: Path) -> None:
    """Into a file beside the target, then moved: another process may be doing the same."""
    handle, made = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        for flags in ((*FLAGS, *HERE), FLAGS):  # not every compiler knows the processor's own
            done = subprocess.run(
                [*compiler, *flags, str(source), "-o", made, *LIBRARIES],
                capture_output=True, text=True, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if done.returncode == 0:
                os.replace(made, target)
                return
        raise OSError(f"{compiler[0]} failed: {done.stderr.strip()[:200]}")
    finally:
        Path(made).unlink(missing_ok=True)


def _folder() -> Path:
    """The cache directory, if nobody else can write to it, as what lies there is run; else one of this process."""
    base = os.environ.get("XDG_CACHE_HOME") or ("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    folder = Path(base).expanduser() / "bnviz"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    return _own_folder()


@cache
def _own_folder() -> Path:
    """Removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="bnviz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _processor() -> str:
    """What the library is compiled for: the architecture and, on Linux, what the processor can do."""
    said = [platform.machine(), platform.processor(), sys.platform]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        said += sorted({line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model name")})
    except OSError:
        pass
    return "\n".join(said)

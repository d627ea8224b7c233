"""C kernels: built once by the system's compiler, kept in a folder, run on a pool of threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from deepopt.kernels.c import C

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# No contraction into fused multiply-adds, which would round otherwise than the plain path does.
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-trapping-math", "-fopenmp-simd", "-fno-strict-aliasing"),
)
CHUNK = 1 << 16


class Unavailable(RuntimeError):
    """There is no compiler, or it failed; says what it said."""


@cache
def compiler() -> tuple[str, ...]:
    """The command of the C compiler, from CC, or cc, gcc or clang. Raises Unavailable."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [["cc"], ["gcc"], ["clang"]]:
        path = shutil.which(command[0])
        if path:
            return (path, *command[1:])
    raise Unavailable(
        f"no C compiler was found (CC={os.environ.get('CC', '')!r}, cc, gcc, clang); install one, "
        "or set CC"
    )


@cache
def _machine() -> str:
    """What a binary for this very processor depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((x for x in lines if x.lower().startswith(("flags", "features"))), "")
    except OSError:
        flags = ""
    path = Path(compiler()[0]).resolve()
    stamp = path.stat()
    return " ".join(
        [platform.machine(), flags, str(path), str(stamp.st_size), str(stamp.st_mtime_ns)]
    )


@cache
def folder() -> Path:
    """Where kernels are kept: DEEPOPT_CACHE, or deepopt in the user's cache folder.

    A folder that cannot be written, or that others can write, is not used: then kernels live in
    one that lasts as long as the process, and a warning says so once.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("DEEPOPT_CACHE") or Path(base) / "deepopt")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError("it must be yours, and writable by you alone (chmod 700)")
        with tempfile.TemporaryFile(dir=path):
            pass
        return path
    except OSError as error:
        warnings.warn(
            f"deepopt keeps its kernels in memory only: the cache folder {path} cannot be used "
            f"({error}); set DEEPOPT_CACHE to one that can",
            RuntimeWarning,
            stacklevel=2,
        )
        scratch = tempfile.TemporaryDirectory(prefix="deepopt-")
        _scratch.append(scratch)
        return Path(scratch.name)


_scratch: list[tempfile.TemporaryDirectory[str]] = []
_loaded: dict[str, ctypes.CDLL] = {}


def libraries(sources: Iterable[str]) -> list[ctypes.CDLL]:
    """The compiled sources, each built at most once; several are built side by side.

    Raises Unavailable with the first lines of what the compiler said.
    """
    keys = {source: _key(source) for source in dict.fromkeys(sources)}
    missing = [source for source, key in keys.items() if key not in _loaded and not _load(key)]
    most = max(1, os.cpu_count() or 1)
    for i in range(0, len(missing), most):
        started = [_Build(source, keys[source]) for source in missing[i : i + most]]
        for build in started:
            build.finish()
    return [_loaded[keys[source]] for source in keys]


def _key(source: str) -> str:
    parts = (source, *FLAGS, *compiler()[1:], _machine())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _load(key: str) -> bool:
    """Load a kept library; a file that is not what its name says counts as missing."""
    try:
        for path in (folder() / key).glob("*.so"):
            own = path.stat().st_uid == os.getuid()
            if own and hashlib.sha256(path.read_bytes()).hexdigest() == path.stem:
                _loaded[key] = ctypes.CDLL(str(path))
                return True
    except OSError:
        pass
    return False


class _Build:
    """A run of the compiler; the result gets its name, its own digest, only when it is whole."""

    def __init__(self, source: str, key: str) -> None:
        self.key = key
        self.work = tempfile.TemporaryDirectory(dir=folder(), prefix="build-")
        self.out = Path(self.work.name) / "kernel.so"
        code = Path(self.work.name) / "kernel.c"
        code.write_text(source)
        self.command = [*compiler(), *FLAGS, "-o", str(self.out), str(code), "-lm", "-lpthread"]
        self.process = self._start("-march=native")

    def _start(self, *extra: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*self.command, *extra], stdout=pipe, stderr=pipe, text=True)

    def finish(self) -> None:
        with self.work:
            said = self.process.communicate()[1]
            if self.process.returncode:
                # Some compilers do not know their own processor by that name.
                self.process = self._start()
                said = self.process.communicate()[1]
            if self.process.returncode:
                lines = "\n".join(said.splitlines()[:6])
                raise Unavailable(f"{compiler()[0]} failed on a kernel:\n{lines}")
            place = folder() / self.key
            place.mkdir(mode=0o700, exist_ok=True)
            digest = hashlib.sha256(self.out.read_bytes()).hexdigest()
            os.replace(self.out, place / f"{digest}.so")
        if not _load(self.key):
            raise Unavailable(f"the kernel in {place} cannot be loaded after it was built")


class _Launch(ctypes.Structure):
    """`deepopt_launch` of runtime.c."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("entries", "tensors", "parameters", "reductions", "sweeps", "chunks")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "functions",
                "epilogue",
                "first_reduction",
                "is_max",
                "table",
                "values",
                "row",
                "size",
                "place",
                "first_chunk",
                "chunk_entry",
            )
        ),
        ("chunk", ctypes.c_int64),
        ("partial", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
        ("small", ctypes.c_int64),
        ("key", ctypes.c_uint32 * 2),
        ("step", ctypes.c_uint32),
    ]


@cache
def runtime() -> ctypes.CDLL:
    """The pool of threads. Raises Unavailable."""
    (library,) = libraries([(Path(__file__).parent / "runtime.c").read_text()])
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.deepopt_run.argtypes = [ctypes.POINTER(_Launch)]
    library.deepopt_counts.argtypes = [number, pointer, pointer]
    library.deepopt_count.argtypes = [number, pointer]
    for name in ("deepopt_run", "deepopt_counts", "deepopt_count"):
        getattr(library, name).restype = None
    return library


def addresses(library: ctypes.CDLL, names: Sequence[str]) -> list[int]:
    """Where the functions of a library are; 0 for those that it does not have."""
    found = [getattr(library, name, None) for name in names]
    return [ctypes.cast(f, ctypes.c_void_p).value or 0 if f is not None else 0 for f in found]


class Kernel:
    """A region in C, built; `launch` it over parameters of any number and size."""

    def __init__(self, written: C, library: ctypes.CDLL) -> None:
        region = written.region
        self.tensors = written.tensors
        self.parameters = len(region.parameters)
        self.library = library  # Its functions live as long as it does.
        names = [f"sweep_{i}" for i in range(len(region.sweeps))]
        self.functions = np.array(addresses(library, names), np.int64)
        (self.epilogue,) = addresses(library, ["epilogue"])
        counts = [0, *(len(sweep.reductions) for sweep in region.sweeps)]
        self.first_reduction = np.cumsum(counts, dtype=np.int64)
        self.is_max = np.array([x.op == "max" for x in region.reductions], np.int64)

    def launch(self, sizes: Array, rows: Array, places: Array) -> Launch:
        return Launch(self, sizes, rows, places)


_kernels: dict[str, Kernel] = {}


def kernels(written: Sequence[C]) -> list[Kernel]:
    """Regions built, side by side where several are new. Raises Unavailable."""
    runtime()
    sources = [x.source() for x in written]
    new = {s: x for s, x in zip(sources, written, strict=True) if s not in _kernels}
    for (source, x), library in zip(new.items(), libraries(new), strict=True):
        _kernels[source] = Kernel(x, library)
    return [_kernels[source] for source in sources]


def chunks_of(sizes: Array, chunk: int) -> tuple[Array, Array]:
    """The first chunk of each parameter, and the parameter of each chunk."""
    counts = -(-sizes // chunk)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return first, np.repeat(np.arange(len(sizes)), counts).astype(np.int64)


class Launch:
    """A kernel over certain parameters: tables of addresses and parameters to fill, and a run.

    sizes: entries of each parameter's arrays. rows: which row of `values` holds its scalars.
    places: which random numbers round its weights.
    """

    def __init__(self, kernel: Kernel, sizes: Array, rows: Array, places: Array) -> None:
        entries, reductions = len(sizes), len(kernel.is_max)
        self.kernel = kernel
        self.table = np.zeros((len(kernel.tensors), entries), np.int64)
        self.values = np.zeros((int(rows.max(initial=-1)) + 1, kernel.parameters))
        first, owner = chunks_of(sizes, CHUNK)
        self.chunks = len(owner)
        self._arrays = {
            "functions": kernel.functions,
            "first_reduction": kernel.first_reduction,
            "is_max": kernel.is_max,
            "table": self.table,
            "values": self.values,
            "row": rows.astype(np.int64),
            "size": sizes.astype(np.int64),
            "place": places.astype(np.int64),
            "first_chunk": first,
            "chunk_entry": owner,
            "partial": np.zeros((self.chunks, reductions)),
            "sums": np.zeros((entries, reductions)),
        }
        self._given = _Launch(
            entries=entries,
            tensors=len(kernel.tensors),
            parameters=kernel.parameters,
            reductions=reductions,
            sweeps=len(kernel.functions),
            chunks=self.chunks,
            chunk=CHUNK,
            epilogue=kernel.epilogue,
            **{k: x.ctypes.data for k, x in self._arrays.items()},
        )

    def send(self, step: int, key: tuple[int, int]) -> None:
        """Tell the kernel the step and the key of its random numbers."""
        self._given.key[:] = key
        self._given.step = step

    def start(self) -> None:
        """Run the kernel with what was sent last."""
        given = self._given
        given.threads = threads = torch.get_num_threads()
        # Few enough chunks that the threads have several parameters each to share out.
        given.small = max(4, self.chunks // (4 * threads)) if threads > 1 else 1 << 60
        runtime().deepopt_run(ctypes.byref(given))


def counts(at: Array) -> tuple[float, float]:
    """The least and the greatest of float32 counters at these addresses."""
    found = np.zeros(2, np.float32)
    runtime().deepopt_counts(len(at), at.ctypes.data, found.ctypes.data)
    return float(found[0]), float(found[1])


def count(at: Array) -> None:
    """Add one to float32 counters at these addresses."""
    runtime().deepopt_count(len(at), at.ctypes.data)

"""Kills a process before, or in the middle of, one of the system calls that change its files.

The process is traced, so nothing of what it runs is patched: what counts is what Python, SQLite and
FAISS ask of the system. It has one thread, and works below one folder; what it writes elsewhere,
such as to its terminal, does not count.
"""

import ctypes
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Of linux/ptrace.h, and of a 64-bit machine's linux/audit.h.
_TRACE_ME, _GET_REGISTERS, _SET_REGISTERS, _SYSCALL = 0, 12, 13, 24
_SET_OPTIONS = 0x4200
_OPTIONS = 0x1 | 0x100000  # tell calls from signals; kill it when we die
_AT_A_CALL = signal.SIGTRAP | 0x80
_REGISTERS = struct.Struct("27Q")
_CALL, _FIRST, _SECOND, _THIRD, _FOURTH, _ANSWER = 15, 14, 13, 12, 7, 10  # places in it
# By number on x86-64: what it is called, and which arguments say what it is done to. "fd" is an
# open file, "at" and "path" a path, relative to a folder that is open or to the current one.
_CALLS: dict[int, tuple[str, str]] = {
    1: ("write", "fd"),
    18: ("pwrite", "fd"),
    20: ("writev", "fd"),
    40: ("sendfile", "fd"),
    74: ("fsync", "fd"),
    75: ("fdatasync", "fd"),
    76: ("truncate", "path"),
    77: ("ftruncate", "fd"),
    82: ("rename", "path"),
    83: ("mkdir", "path"),
    84: ("rmdir", "path"),
    86: ("link", "path"),
    87: ("unlink", "path"),
    257: ("open", "at"),
    258: ("mkdir", "at"),
    263: ("unlink", "at"),
    264: ("rename", "at"),
    265: ("link", "at"),
    285: ("fallocate", "fd"),
    316: ("rename", "at"),
    326: ("copy_file_range", "third"),
}
_CREATES = os.O_CREAT | os.O_TRUNC
_HALVED = frozenset({"write", "pwrite"})  # whose third argument says how many bytes
_LONGEST_PATH = 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Call(NamedTuple):
    """A system call that changes a file.

    Args:
        kind: What is done, such as "rename".
        target: To what, relative to the folder.
    """

    kind: str
    target: str


@dataclass(frozen=True, slots=True)
class Death:
    """Where to die.

    Args:
        number: Before which call, from 0.
        is_half_done: Rather after half of it: of what is to be written, half is.
    """

    number: int
    is_half_done: bool = False


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended.

    Args:
        calls: What it changed, in order; the last one is the one that it died at.
        status: Its exit status; None where it was killed.
    """

    calls: tuple[Call, ...]
    status: int | None


def can_trace() -> bool:
    """Whether this machine is one whose system calls are known here."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def run_traced(work: Callable[[], int], folder: Path, death: Death | None = None) -> End:
    """Fork, do something in the child, and kill it at a call; or only list its calls.

    Args:
        work: What the child does; returns its exit status.
        folder: Below which changes count; an absolute path without links.
        death: Where; None for nowhere.
    """
    child = os.fork()
    if not child:
        _libc.ptrace(_TRACE_ME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(work())
    os.waitpid(child, 0)
    _ptrace(_SET_OPTIONS, child, _OPTIONS)
    return _Tracing(child, folder, death).run()


class _Tracing:
    """Follows one child to its end."""

    def __init__(self, child: int, folder: Path, death: Death | None) -> None:
        self._child = child
        self._folder = str(folder)
        self._death = death
        self._calls: list[Call] = []

    def run(self) -> End:
        """Let it run; returns what it did."""
        is_entering, dies_after, passed_on = True, False, 0
        while True:
            _ptrace(_SYSCALL, self._child, passed_on)
            _, status = os.waitpid(self._child, 0)
            if not os.WIFSTOPPED(status):
                code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
                return End(tuple(self._calls), code)
            passed_on = 0
            if os.WSTOPSIG(status) != _AT_A_CALL:
                passed_on = os.WSTOPSIG(status)
                continue
            if is_entering and self._counts():
                if self._death == Death(len(self._calls) - 1):
                    return self._kill()
                dies_after = self._death == Death(len(self._calls) - 1, is_half_done=True)
                if dies_after:
                    self._halve()
            elif not is_entering and dies_after:
                return self._kill()
            is_entering = not is_entering

    def _kill(self) -> End:
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)
        return End(tuple(self._calls), None)

    def _counts(self) -> bool:
        """Whether it is about to change a file of ours; then it is noted."""
        registers = self._registers()
        known = _CALLS.get(registers[_CALL])
        if known is None:
            return False
        kind, how = known
        if kind == "open" and not registers[_THIRD] & _CREATES:
            return False
        target = self._target(registers, how)
        if target is None or not target.startswith(f"{self._folder}/"):
            return False
        if kind == "open" and Path(target).exists() and not registers[_THIRD] & os.O_TRUNC:
            return False  # as of a lock file: it is there already
        self._calls.append(Call(kind, target[len(self._folder) + 1 :]))
        return True

    def _target(self, registers: tuple[int, ...], how: str) -> str | None:
        """The path that a call is about, the first of two."""
        if how in {"fd", "third"}:
            return self._opened(registers[_FIRST if how == "fd" else _THIRD])
        given = self._text(registers[_SECOND if how == "at" else _FIRST])
        if how == "at" and not given.startswith("/"):
            folder = ctypes.c_int(registers[_FIRST] & 0xFFFFFFFF).value
            if folder >= 0:  # else it is the current one
                return f"{self._opened(folder)}/{given}"
        return str(Path(f"/proc/{self._child}/cwd").readlink() / given)

    def _opened(self, number: int) -> str | None:
        try:
            return str(Path(f"/proc/{self._child}/fd/{number}").readlink())
        except OSError:
            return None

    def _text(self, address: int) -> str:
        with Path(f"/proc/{self._child}/mem").open("rb", buffering=0) as memory:
            memory.seek(address)
            return os.fsdecode(memory.read(_LONGEST_PATH).partition(b"\0")[0])

    def _halve(self) -> None:
        """Have half of what is to be written be written."""
        registers = [*self._registers()]
        if self._calls[-1].kind in _HALVED:
            registers[_THIRD] //= 2
            packed = ctypes.create_string_buffer(_REGISTERS.pack(*registers))
            _ptrace(_SET_REGISTERS, self._child, ctypes.addressof(packed))

    def _registers(self) -> tuple[int, ...]:
        packed = ctypes.create_string_buffer(_REGISTERS.size)
        _ptrace(_GET_REGISTERS, self._child, ctypes.addressof(packed))
        return _REGISTERS.unpack(packed.raw)


def _ptrace(request: int, child: int, data: int) -> None:
    if _libc.ptrace(request, child, None, data) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"expected to trace a child, got: {os.strerror(error)}")

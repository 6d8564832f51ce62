"""What this process may use of its machine: as much memory and as many cores as containers, jobs and shells leave it.

The kernel tells every process of the whole machine. What a control group (of either version), a limit of `ulimit` or
an affinity takes away must be asked for; whoever uses more is killed, or made to wait.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # not on Windows
    _LIMITS: dict[str, tuple[int, int]] = {}
else:
    # by what they limit, with what a thread takes of that: its stack, and of addresses a heap besides
    _LIMITS = {"VmSize": (resource.RLIMIT_AS, 72 << 20), "VmData": (resource.RLIMIT_DATA, 9 << 20)}

_OTHER_THREADS = 4  # that write, differentiate and wait for files, besides two a core that compute and decode

_ROOT = Path("/")


def free_memory(root: Path = _ROOT) -> int:
    """Bytes that this process can use now without swapping, failing or being killed.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are.
    """
    return max(0, min([_free_on_machine(root), *_left_in_groups(root), *_left_of_process(root)]))


def usable_cores(root: Path = _ROOT) -> int:
    """Cores that this process may keep busy, at least 1: those of its affinity, or fewer by its groups' quotas."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([mine, *(math.ceil(share) for share in _quotas(root))]))


def _free_on_machine(root: Path) -> int:
    available = _fields(root / "proc/meminfo").get("MemAvailable")
    if available is not None:
        return available * 1024
    # not Linux: half of the physical memory is a fair guess
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each group has left, where what it keeps of files counts as free: the kernel gives that up first."""
    for group in _groups(root, "memory"):
        stat = _fields(group / "memory.stat")
        for limit, used, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.high", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            most, now = _number(group / limit), _number(group / used)
            if most is not None and now is not None:
                yield most - now + sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))


def _left_of_process(root: Path) -> Iterator[int]:
    """What is left of the limits of address space (``ulimit -v``) and of data (``ulimit -d``), threads apart."""
    status = _fields(root / "proc/self/status")
    for used, (limit, of_thread) in _LIMITS.items():
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and used in status:
            yield most - status[used] * 1024 - (2 * usable_cores(root) + _OTHER_THREADS) * of_thread


def _quotas(root: Path) -> Iterator[float]:
    """How many cores' time each group may use."""
    for group in _groups(root, "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        both = _words(group / "cpu.max")
        if len(both) == 2 and all(word.isdigit() for word in both):
            quota, period = map(int, both)
        if quota and period and quota > 0:
            yield quota / period


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the control groups that this process is in, and of those above them, which limit it as well."""
    own: dict[str, str] = {}  # the path of its group by controller; of version 2, under ""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), f"{path.rstrip('/')}/")
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        kind, *_, options = system.split()
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            path = own.get("" if kind == "cgroup2" else controller, "")
            of_mount, place = mount.split()[3:5]
            if path:
                home, of_mount = root / place.lstrip("/"), f"{of_mount.rstrip('/')}/"
                # a container finds its own group at the mount, whatever it is called outside
                is_below = path.startswith(of_mount) and ".." not in path
                folder = home / path.removeprefix(of_mount) if is_below else home
                yield from (one for one in (folder, *folder.parents) if one.is_relative_to(home))


def _fields(path: Path) -> dict[str, int]:
    """Numbers by name, from lines such as ``MemAvailable: 123 kB`` or ``inactive_file 123``."""
    words = (line.replace(":", " ").split() for line in _lines(path))
    return {name: int(value) for name, value, *_ in (some for some in words if len(some) > 1) if value.isdigit()}


def _number(path: Path) -> int | None:
    """The number that a file holds; None for ``max``, or where there is no file."""
    words = _words(path)
    return int(words[0]) if len(words) == 1 and words[0].lstrip("-").isdigit() else None


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []

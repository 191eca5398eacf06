"""Disks of a drawn size: tmpfs in a mount namespace of the process's own (Linux), so that nothing outside sees them."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


def own_mounts() -> None:
    """Gives this process, which must be a forked one, mounts of its own and the right to change them.

    Raises:
        OSError: the system does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        return
    error = ctypes.get_errno()
    if user != 0 or libc.unshare(_CLONE_NEWNS):  # root needs no user namespace
        raise OSError(error, os.strerror(error), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def mount(disk: Path, options: str) -> None:
    """Mounts a tmpfs, or changes a mounted one with ``remount``."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.returncode, f"{' '.join(command)}: {done.stderr}")


def unmount(disk: Path) -> None:
    subprocess.run(["umount", str(disk)], check=True)


def used(disk: Path) -> int:
    """Bytes in use."""
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize

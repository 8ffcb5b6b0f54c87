"""Keeps the workers' ports to this machine: TensorFlow's servers have no authentication and listen on every interface.

A network namespace of its own holds nothing but a loopback interface; the workers, which are started from it, reach each other
and nobody else reaches them. Root may make one; others may where the system allows user namespaces.
"""

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

# <linux/sched.h>, <linux/sockios.h>, <linux/if.h>
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1


def isolate() -> str:
    """Moves this process, and so its children to come, into a network namespace of its own. Call it before starting threads.

    Returns:
        Why that is not possible; empty when it is done.
    """
    # A child tries it first: where only the half of it is allowed (Ubuntu 24.04, apparmor_restrict_unprivileged_userns), who
    # has tried is left without any network.
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, _move().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        reason = answer.read()
    os.waitpid(child, 0)
    return reason or _move()


def _move() -> str:
    """As `isolate`, without a way back."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNET if uid == 0 else _CLONE_NEWUSER | _CLONE_NEWNET):
        return os.strerror(ctypes.get_errno())
    try:
        if uid:
            # Files stay this user's: the new user namespace knows this user alone, by the same number.
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
            Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        _bring_up("lo")
    except OSError as error:
        return f"a network namespace cannot be set up: {error.strerror}"
    return ""


def _bring_up(interface: str) -> None:
    name = interface.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sh14x", name, 0))
        (flags,) = struct.unpack_from("h", answer, 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", name, flags | _IFF_UP))

"""By which addresses and interface a host meets the first one."""

import contextlib
import ipaddress
import os
import socket
import subprocess
from typing import NamedTuple

import psutil

from infini_ds.errors import UserError


class Route(NamedTuple):
    """The interface on the way to an address, this host's address there, and the other one."""

    interface: str
    own: str
    towards: str


def meeting_address() -> str:
    """Of the first host: as DeepSpeed finds it there, where it is not told one.

    Raises:
        OSError: this host has none.
    """
    done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False)
    addresses = done.stdout.split()
    if not addresses:
        raise OSError("`hostname -I` names no address")
    return addresses[0]


def route_to(address: str) -> Route:
    """The route to an address, or the host's interface that has it; sends nothing.

    Raises:
        OSError: there is no route.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        own, towards = probe.getsockname()[0], probe.getpeername()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return Route(name, own, towards)
    raise OSError(f"no interface has {own}, the address towards {address}")


def route_to_first(address: str) -> Route:
    """The route to the address at which the ranks meet, which may be a name.

    On Debian a host's own name stands for 127.0.1.1. There the route is that to the address which
    the others know this host by.

    Raises:
        OSError: there is no route.
    """
    route = route_to(address)
    if _is_loopback(route.towards) and not _is_loopback(address):
        return route_to(meeting_address())
    return route


def name_interface() -> None:
    """Has gloo and NCCL use the interface towards MASTER_ADDR, in a rank of a run on several hosts.

    Gloo would take the one of this host's own name, and NCCL any one. What the user has set of
    GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME stays.
    """
    address = os.environ.get("MASTER_ADDR", "localhost")
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    if local == os.environ.get("WORLD_SIZE") or _is_loopback(address):
        return
    with contextlib.suppress(OSError):  # without a route the ranks say that they do not meet
        interface = route_to_first(address).interface
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # = : not as a prefix


def check_address() -> None:
    """Whether MASTER_ADDR leads anywhere: PyTorch would try until its limit.

    Raises:
        UserError: no such name is known here.
    """
    address = os.environ.get("MASTER_ADDR", "localhost")
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        if error.errno == socket.EAI_AGAIN:
            return  # the server of names may answer the next time
        raise UserError(
            f"environment variable MASTER_ADDR={address!r}: is no address and no name that "
            f"{socket.gethostname()} knows ({error.strerror}); give all hosts an address of the "
            "first one (deepspeed --master_addr)"
        ) from None


def check_interfaces(backend: str) -> None:
    """Whether the interfaces that gloo or nccl is to use are there.

    Raises:
        UserError: one is not.
    """
    name = f"{backend.upper()}_SOCKET_IFNAME"
    value = os.environ.get(name, "")
    # NCCL's are prefixes, but after `=`, may name a port, and after `^` are those not to be used.
    prefixes = backend == "nccl" and not value.startswith("=")
    wanted = [] if backend == "nccl" and value.startswith("^") else value.split(",")
    there = psutil.net_if_addrs()
    for each in filter(None, wanted):
        named = each.lstrip("=").partition(":")[0] if backend == "nccl" else each
        if not any(one.startswith(named) if prefixes else one == named for one in there):
            raise UserError(
                f"environment variable {name}={value!r}: {socket.gethostname()} has no interface "
                f"{each}, but {', '.join(there)}; unset it, or name one of these"
            )


def _is_loopback(address: str) -> bool:
    """Whether it is one by itself; a name, other than localhost, is none."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"

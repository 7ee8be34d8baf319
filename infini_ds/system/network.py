"""Finds the addresses and the interface by which a host reaches the first one."""

import contextlib
import ipaddress
import os
import socket
import subprocess
from typing import NamedTuple

import psutil

from infini_ds.errors import UserError


class Route(NamedTuple):
    """The interface to an address, this host's own address on it, and that address."""

    interface: str
    own: str
    towards: str


def meeting_address() -> str:
    """Returns the first host's address as DeepSpeed finds it when no address is given.

    Raises:
        OSError: this host has no address.
    """
    done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False)
    addresses = done.stdout.split()
    if not addresses:
        raise OSError("`hostname -I` names no address")
    return addresses[0]


def route_to(address: str) -> Route:
    """Finds the route to an address, or the interface of this host that has it; sends nothing.

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
    """Finds the route to the address at which the ranks meet, which may be a name.

    On Debian a host's own name resolves to 127.0.1.1. There the route leads to the address by which
    the other hosts know this one.

    Raises:
        OSError: there is no route.
    """
    route = route_to(address)
    if _is_loopback(route.towards) and not _is_loopback(address):
        return route_to(meeting_address())
    return route


def name_interface() -> None:
    """Makes gloo and NCCL use the interface towards MASTER_ADDR, on each rank of several hosts.

    Otherwise gloo would take the interface of the host's own name, and NCCL any. Values of
    GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME that the user has set stay.
    """
    address = os.environ.get("MASTER_ADDR", "localhost")
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    if local == os.environ.get("WORLD_SIZE") or _is_loopback(address):
        return
    with contextlib.suppress(OSError):  # without a route, joining the ranks reports the error
        interface = route_to_first(address).interface
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # = : an exact name


def check_address() -> None:
    """Checks that MASTER_ADDR can be resolved, since PyTorch would retry until its time limit.

    Raises:
        UserError: the name is not known here.
    """
    address = os.environ.get("MASTER_ADDR", "localhost")
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        if error.errno == socket.EAI_AGAIN:
            return  # the name server may answer next time
        raise UserError(
            f"environment variable MASTER_ADDR={address!r}: is neither an address nor a name that "
            f"{socket.gethostname()} knows ({error.strerror}); give all hosts an address of the "
            "first one (deepspeed --master_addr)"
        ) from None


def check_interfaces(backend: str) -> None:
    """Checks that the interfaces named for gloo or nccl exist.

    Raises:
        UserError: an interface does not exist.
    """
    name = f"{backend.upper()}_SOCKET_IFNAME"
    value = os.environ.get(name, "")
    # NCCL's names are prefixes unless `=` precedes, may name a port, and are exclusions after `^`.
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
    """Tells whether an address is a loopback one; of names, only localhost counts."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"

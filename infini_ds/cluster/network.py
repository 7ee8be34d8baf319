"""By which addresses and interface a host meets the first one."""

import socket
import subprocess
from typing import NamedTuple

import psutil


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

"""The way to another host, as this machine's own network has it."""

import os
import socket

import psutil
import pytest

from infini_ds.errors import UserError
from infini_ds.system import network


def test_route_to_an_own_address_is_the_interface_that_has_it():
    assert network.route_to("127.0.0.1") == ("lo", "127.0.0.1", "127.0.0.1")
    assert network.route_to("localhost").interface == "lo"


def test_meeting_address_is_one_of_this_host():
    own = {
        each.address
        for addresses in psutil.net_if_addrs().values()
        for each in addresses
        if each.family in (socket.AF_INET, socket.AF_INET6)
    }
    try:
        address = network.meeting_address()
    except OSError as error:
        assert str(error) == "`hostname -I` names no address"  # noqa: PT017
    else:
        assert address in own
        assert network.route_to(address).own == address


def test_name_that_does_not_exist_is_an_error():
    with pytest.raises(OSError, match=r"\w"):
        network.route_to("no-such-host.invalid")


@pytest.fixture
def routes(monkeypatch):
    """A host, node-1, whose own name stands for 127.0.1.1, and which others know as 10.0.0.1."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "")  # so that what is set in a test goes after it
        monkeypatch.delenv(name)
    known = {
        "node-1": network.Route("lo", "127.0.1.1", "127.0.1.1"),
        "10.0.0.1": network.Route("eth1", "10.0.0.1", "10.0.0.1"),
        "node-2": network.Route("eth0", "10.0.0.1", "10.0.0.2"),
    }
    monkeypatch.setattr(network, "route_to", known.__getitem__)
    monkeypatch.setattr(network, "meeting_address", lambda: "10.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return monkeypatch


def named() -> tuple[str | None, str | None]:
    network.name_interface()
    return os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("address", "interface"), [("10.0.0.1", "eth1"), ("node-1", "eth1"), ("node-2", "eth0")]
)
def test_interface_towards_the_first_host_is_named(routes, address, interface):
    routes.setenv("MASTER_ADDR", address)
    assert named() == (interface, f"={interface}")


def test_what_the_user_named_stays(routes):
    routes.setenv("MASTER_ADDR", "node-2")
    routes.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert named() == ("ib0", "=eth0")


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1"])
def test_nothing_is_named_where_the_ranks_meet_on_the_loopback(routes, address):
    routes.setenv("MASTER_ADDR", address)
    assert named() == (None, None)


@pytest.mark.parametrize("launcher", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_nothing_is_named_on_a_single_host(routes, launcher):
    routes.setenv("MASTER_ADDR", "node-2")
    routes.delenv("LOCAL_WORLD_SIZE")
    routes.setenv(launcher, "4")
    assert named() == (None, None)


def test_without_a_route_nothing_is_named(routes):
    def fail(address):
        raise OSError("Network is unreachable")

    routes.setattr(network, "route_to", fail)
    routes.setenv("MASTER_ADDR", "node-2")
    assert named() == (None, None)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", False), ("GLOO_SOCKET_IFNAME", "eth0,ib0", False),
        ("GLOO_SOCKET_IFNAME", "", False), ("GLOO_SOCKET_IFNAME", "eth", True),
        ("GLOO_SOCKET_IFNAME", "eth0,eth9", True), ("GLOO_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "eth", False), ("NCCL_SOCKET_IFNAME", "=eth0", False),
        ("NCCL_SOCKET_IFNAME", "=eth", True), ("NCCL_SOCKET_IFNAME", "^docker0,lo", False),
        ("NCCL_SOCKET_IFNAME", "wlan", True), ("NCCL_SOCKET_IFNAME", "=ib0:1,eth0", False),
    ],
)  # fmt: skip
def test_interface_that_is_not_there_is_named(monkeypatch, name, value, refused):
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [], "eth0": [], "ib0": []})
    monkeypatch.setenv(name, value)
    backend = name.partition("_")[0].lower()
    if not refused:
        network.check_interfaces(backend)
        return
    with pytest.raises(UserError) as caught:
        network.check_interfaces(backend)
    assert str(caught.value).startswith(f"environment variable {name}={value!r}: ")
    assert "lo, eth0, ib0" in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost", "fe80::1"])
def test_address_of_the_first_host_leads_somewhere(monkeypatch, address):
    monkeypatch.setenv("MASTER_ADDR", address)
    network.check_address()


@pytest.mark.parametrize("address", ["no-such-host.invalid", "node-[1-2]", "256.1.1.1.1", "a b"])
def test_address_of_the_first_host_that_leads_nowhere_is_named(monkeypatch, address):
    def fail(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setenv("MASTER_ADDR", address)
    with pytest.raises(UserError, match=r"^environment variable MASTER_ADDR=.*not known"):
        network.check_address()


def test_server_of_names_that_does_not_answer_just_now_is_asked_again_by_others(monkeypatch):
    def fail(*_):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    network.check_address()

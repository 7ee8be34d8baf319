"""The way to another host, as this machine's own network has it."""

import socket

import psutil
import pytest

from infini_ds.cluster import network


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

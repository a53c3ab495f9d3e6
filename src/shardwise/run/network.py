"""Addresses: HOST:PORT endpoints, and which network interface leads to a host."""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path
from typing import Any

from shardwise import errors

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """(host, port) of a text "HOST:PORT" (an IPv6 host in brackets).

    Raises:
        UserError: it is not of that form.
    """
    host, colon, port = endpoint.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise errors.UserError(
            f"the rendezvous endpoint is {endpoint!r}; it must be HOST:PORT of node 0, such as 10.0.0.1:29500."
        )
    return host, int(port)


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens at, just now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def interface_towards(host: str) -> str | None:
    """Name of this machine's interface that leads to `host`, or None where it cannot be told.

    gloo otherwise takes the interface of the machine's own host name, which on many machines does not resolve, or
    resolves to an address that the other nodes cannot reach.
    """
    if sys.platform != "linux":
        return None
    for family, _, _, _, place in _places(host):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(place)  # a datagram socket: chooses the route, sends nothing
                own = probe.getsockname()[0]
        except OSError:
            continue
        if family == socket.AF_INET6:
            return _interface_of_6(own)
        return next((name for _, name in socket.if_nameindex() if _address_of(name) == own), None)
    return None


def _places(host: str) -> list[Any]:
    try:
        return socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return []


def _interface_of_6(address: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()  # address, four numbers, name
    except OSError:
        return None
    return next((fields[-1] for line in lines if (fields := line.split())[0] == wanted), None)


def _address_of(interface: str) -> str | None:
    import fcntl  # not on every system

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:
            return None

"""The network interface by which gloo connects the nodes of a run.

By itself gloo takes the address that the machine's own name has. On Debian and Ubuntu that is 127.0.1.1, which other
nodes cannot reach. The interface that leads to the other nodes is known once they have met.
"""

import os
import socket

import psutil

from fsdp_qlora.runtime.launcher import Launch
from fsdp_qlora.torch_compat import Store

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
HEAD = "head"  # key of the address by which other nodes reach the first


def choose_interface(store: Store, launch: Launch) -> None:
    """Let gloo use the interface that connects the nodes, unless the user has named one.

    Every rank calls it, after all have come. Changes nothing on one node, or where no interface has the address."""
    if launch.size == launch.local_size or GLOO_INTERFACE in os.environ:
        return
    is_on_head = launch.rank == launch.local_rank
    if is_on_head:
        own = store.get(HEAD).decode()
    else:
        own, head = _route(launch)
        store.set(HEAD, head)
    name = _interface_of(own)
    if name is not None:
        os.environ[GLOO_INTERFACE] = name


def _route(launch: Launch) -> tuple[str, str]:
    """Return (this node's address on the way to the first node, the first node's); no packet is sent."""
    assert launch.address is not None
    family, kind, _, _, place = socket.getaddrinfo(launch.address, launch.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as way:
        way.connect(place)
        return way.getsockname()[0], way.getpeername()[0]


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address.partition("%")[0] for one in addresses):
            return name
    return None

"""Programs that want to reach somebody, in each combination of layers that protects the network."""

import asyncio
import contextlib
import os
import socket

import pytest

CLIENTS = {
    "tcp": "s = socket.socket(); s.connect(('127.0.0.1', {port})); s.send(b'out')",
    "udp": "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'out', ('127.0.0.1', {udp}))",
    "abstract": "s = socket.socket(socket.AF_UNIX); s.connect({abstract!r}); s.send(b'out')",
    "path": "s = socket.socket(socket.AF_UNIX); s.connect({path!r}); s.send(b'out')",
    "netlink": "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); s.bind((0, 0)); assert 0, 'nothing to reach'",
    "datagram to a path": "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'out', {path_udp!r})",
    "abstract datagram": "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'out', {abstract_udp!r})",
    "raw datagram": "socket.socketpair(type=socket.SOCK_RAW)[0].sendto(b'out', {abstract_udp!r})",
    "name": "socket.create_connection(('localhost', {port})).send(b'out')",
}


@pytest.mark.needs("network")
@pytest.mark.parametrize("client", CLIENTS.values(), ids=list(CLIENTS))
def test_nothing_leaves_by_the_network(run, client, tmp_path):
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    places = {
        "port": (socket.AF_INET, stream, ("127.0.0.1", 0)),
        "udp": (socket.AF_INET, datagram, ("127.0.0.1", 0)),
        "abstract": (socket.AF_UNIX, stream, f"\0miles-retool-{os.getpid()}"),
        "abstract_udp": (socket.AF_UNIX, datagram, f"\0miles-retool-udp-{os.getpid()}"),
        "path": (socket.AF_UNIX, stream, str(tmp_path / "s")),
        "path_udp": (socket.AF_UNIX, datagram, str(tmp_path / "d")),
    }
    heard, addresses = [], {}
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o5)
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(socket.socket(*kind)) for name, (*kind, _) in places.items()}
        for name, (family, kind, address) in places.items():
            servers[name].bind(address)
            servers[name].settimeout(0.01)
            addresses[name] = address if family == socket.AF_UNIX else servers[name].getsockname()[1]
            if kind == stream:
                servers[name].listen()
        for path in tmp_path.iterdir():
            path.chmod(0o777)
        result = run("import socket\n" + client.format(**addresses))
        for server in servers.values():
            with contextlib.suppress(TimeoutError):
                heard.append(server.recv(10) if server.type == datagram else server.accept())
    assert heard == []
    assert result.failed


@pytest.mark.needs("network")
def test_calls_do_not_meet_in_the_network(sandbox):
    """They have one of nothing in common where there are no sockets."""
    listens = "import socket; a, _ = socket.socketpair(type=socket.SOCK_DGRAM); a.bind('\\0meet'); a.settimeout(1)"

    async def both():
        first = asyncio.create_task(sandbox.run(f"{listens}; print(a.recv(9))"))
        await asyncio.sleep(0.4)
        await sandbox.run(
            "import socket; a, _ = socket.socketpair(type=socket.SOCK_DGRAM); a.sendto(b'psst', '\\0meet')"
        )
        return await first

    assert asyncio.run(both()).stdout == ""

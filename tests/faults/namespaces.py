"""Two hosts on one machine: network namespaces, joined by one cable that can be pulled."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Host:
    """One of the two: how to run a command there, its address, and its end of the cable."""

    name: str
    address: str
    interface: str

    @property
    def prefix(self) -> list[str]:
        """Goes before a command that is to run there."""
        return ["ip", "netns", "exec", self.name]

    @property
    def environment(self) -> dict[str, str]:
        """gloo cannot know by itself which interface leads to the other host."""
        return {"GLOO_SOCKET_IFNAME": self.interface}

    def cable(self, state: str) -> None:
        """`up` or `down`."""
        _ip("-n", self.name, "link", "set", self.interface, state)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts on one network of their own; skips the test, with the reason, where they cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2's ip")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    unique = uuid.uuid4().hex[:6]
    pair = tuple(Host(f"sieve-{unique}-{end}", f"10.77.0.{n}", f"sv{unique}{end}") for n, end in ((1, "a"), (2, "b")))
    made: list[Host] = []
    try:
        try:
            for host in pair:
                _ip("netns", "add", host.name)
                made.append(host)
            _ip("link", "add", pair[0].interface, "netns", pair[0].name, "type", "veth",
                "peer", "name", pair[1].interface, "netns", pair[1].name)  # fmt: skip
            for host in pair:
                _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
                _ip("-n", host.name, "link", "set", "lo", "up")
                host.cable("up")
                # torchrun reads from its store without a limit of its own; TCP's is a quarter of an hour by default.
                subprocess.run([*host.prefix, "sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2"], check=True)
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield pair[0], pair[1]
    finally:
        for host in made:  # with its namespace an end of the cable goes, and the other end with it
            _ip("netns", "del", host.name)

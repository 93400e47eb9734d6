"""Two hosts on one machine: network namespaces, joined by one cable that can be pulled or slowed down."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


class Unavailable(Exception):
    """Namespaces cannot be made here; the text says why, in one line."""


@dataclass(frozen=True)
class Host:
    """One of them: how to run a command there, its address, and its end of the cable."""

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
        _run("ip", "-n", self.name, "link", "set", self.interface, state)

    def slow_down(self, rate: str) -> None:
        """Send no faster than `rate`, such as `1gbit`, by a token bucket of 0.5 ms and at least 128 KB."""
        burst = f"{max(128 << 10, int(_bits(rate) / 8 * 5e-4))}"
        words = ("qdisc", "replace", "dev", self.interface, "root", "tbf", "rate", rate, "burst", burst)
        _run("tc", "-n", self.name, *words, "latency", "100ms")

    def sent(self) -> int:
        """Bytes that have left by its end of the cable."""
        path = f"/sys/class/net/{self.interface}/statistics/tx_bytes"
        return int(_run(*self.prefix, "cat", path))


def _bits(rate: str) -> float:
    units = {"gbit": 1e9, "mbit": 1e6}
    return float(rate[:-4]) * units[rate[-4:]]


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _check(*commands: str) -> None:
    for command in commands:
        if shutil.which(command) is None:
            raise Unavailable(f"network namespaces need iproute2's {command}")
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")


@contextlib.contextmanager
def _made(hosts: Sequence[Host]) -> Iterator[None]:
    made: list[Host] = []
    try:
        try:
            for host in hosts:
                _run("ip", "netns", "add", host.name)
                made.append(host)
                _run("ip", "-n", host.name, "link", "set", "lo", "up")
        except OSError as error:
            raise Unavailable(f"network namespaces cannot be made here: {error}") from error
        yield
    finally:
        for host in made:  # with its namespace an end of the cable goes, and the other end with it
            _run("ip", "netns", "del", host.name)


@contextlib.contextmanager
def pair() -> Iterator[tuple[Host, Host]]:
    """Two hosts on one network of their own. Raises Unavailable where they cannot be made."""
    _check("ip")
    unique = uuid.uuid4().hex[:6]
    first, second = (
        Host(f"sieve-{unique}-{end}", f"10.77.0.{n}", f"sv{unique}{end}") for n, end in ((1, "a"), (2, "b"))
    )
    with _made((first, second)):
        try:
            _run("ip", "link", "add", first.interface, "netns", first.name, "type", "veth",
                 "peer", "name", second.interface, "netns", second.name)  # fmt: skip
            for host in (first, second):
                _run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
                host.cable("up")
                # torchrun reads from its store without a limit of its own; TCP's is a quarter of an hour by default.
                _run(*host.prefix, "sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")
        except OSError as error:
            raise Unavailable(f"network namespaces cannot be made here: {error}") from error
        yield first, second


@contextlib.contextmanager
def alone() -> Iterator[Host]:
    """One host whose loopback nobody else uses, so that its counters tell of one job. Raises Unavailable as `pair`."""
    _check("ip")
    host = Host(f"sieve-{uuid.uuid4().hex[:6]}", "127.0.0.1", "lo")
    with _made((host,)):
        yield host

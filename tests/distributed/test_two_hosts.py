"""Ranks on two hosts, which are network namespaces of this machine: root may make them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ADDRESSES = ["10.213.77.1", "10.213.77.2"]
HOSTS = [f"normcore-{os.getpid()}-{i}" for i in range(2)]
LINKS = [f"nc{os.getpid()}-{i}" for i in range(2)]
TIMEOUT = 120  # seconds


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two namespaces with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("there is no command ip")
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1])
        for host, link, address in zip(HOSTS, LINKS, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", host)
            ip("-n", host, "address", "add", f"{address}/24", "dev", link)
            for name in (link, "lo"):
                ip("-n", host, "link", "set", name, "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for host in HOSTS:  # their links go with them
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", host)


def test_two_hosts(hosts: None) -> None:
    """Groups of all ranks, of those of a host, and across the hosts."""
    program = str(Path(__file__).with_name("two_hosts.py"))
    ranks = []
    for rank in range(4):
        host = HOSTS[rank // 2]
        command = ["ip", "netns", "exec", host, sys.executable, program, str(rank), ADDRESSES[0]]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": LINKS[rank // 2]}
        ranks.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    try:
        texts = [rank.communicate(timeout=TIMEOUT)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * 4, "\n".join(texts)

"""Servers for tests of the server tier: fakeredis, and a real one where it is installed."""

import shutil
import socket
import subprocess
import time

import fakeredis
import redis

from octavo.reuse.resp import LOG


class Fake:
    """A server within this process."""

    def __init__(self):
        self.server = fakeredis.FakeServer()

    def client(self, **options):
        return fakeredis.FakeRedis(server=self.server, **options)


class Real:
    """A redis-server, or a valkey-server, of its own process."""

    def __init__(self, folder, *options):
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        assert program is not None
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        command = [program, "--port", str(self.port), "--save", "", "--dir", str(folder), "--daemonize", "no", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = self.client()
        for _ in range(200):
            try:
                client.ping()
                return
            except redis.ConnectionError:
                time.sleep(0.02)
        raise AssertionError("the server does not start")

    def client(self, **options):
        return redis.Redis.from_url(self.url, **options)

    def stop(self):
        self.process.kill()
        self.process.wait()


def installed():
    return bool(shutil.which("redis-server") or shutil.which("valkey-server"))


def values(client):
    """The names of all records' values."""
    return sorted(k for k in client.keys("octavo:*") if k != LOG.encode() and not k.endswith(b":note"))


def damage(client, name):
    """Flip the last bit of a value."""
    data = bytearray(client.get(name))
    data[-1] ^= 1
    client.set(name, bytes(data))

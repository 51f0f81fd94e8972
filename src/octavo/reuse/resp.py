"""What is asked of a Redis or Valkey server, as docs/formats.md specifies it: values, notes, and the log of changes.

Reads are no transactions, since a server that is full refuses those: what is read may be of two values, where one was
stored anew in between, so it is read once more before it is called damaged. Nothing here waits for long, and all that
goes wrong is an OSError: `RefusedError` where the server answers but will not do it, TimeoutError where it takes too
long.
"""

import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from octavo.errors import ConfigError
from octavo.reuse.files import VERSION, head_nbytes

LOG = f"octavo:{VERSION}:log"
CHANGES = 100_000  # that the log keeps, about 10 MB
LARGEST = 512 * 2**20  # bytes of a value, which RESP bounds
PIECE = 4 * 2**20  # bytes that are read at once
HEAD = 2**16  # bytes of a value's beginning that are asked for first; the head of 15,000 tokens
CONNECT, ANSWER, WRITE, READ = 0.5, 1.0, 10.0, 10.0  # seconds: to connect, for an answer, to send or get a whole value
NOTHING = b"0-0"  # an entry of the log that never is
KEY = re.compile(rb"[0-9a-f]{32}")


class RefusedError(OSError):
    """The server answered, and would not do it."""


class Found(NamedTuple):
    """What lies under a key: bytes of the value, 0 where there is none, its note, its head where asked for."""

    nbytes: int
    note: bytes | None
    head: bytes


class Server:
    """A connection to a server. `remote`: a URL, or a `redis.Redis` that the user has made. Raises ConfigError."""

    def __init__(self, remote: Any) -> None:
        self._reader, self._writer = _connected(remote)
        options = self._reader.connection_pool.connection_kwargs
        place = options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
        self.name = f"the server at {place}"  # a URL may hold a password
        self._last: bytes | None = None  # the newest entry of the log that was read

    def value(self, key: str) -> str:
        """Under what name a record lies there."""
        return f"octavo:{VERSION}:{key}"

    def _note(self, key: str) -> str:
        return f"octavo:{VERSION}:{key}:note"

    # Reading

    def start_over(self) -> None:
        """Have `changes` begin with the oldest that the log knows."""
        self._last = None

    def changes(self, used: Sequence[str] = ()) -> tuple[bool, list[str]]:
        """(whether these are all that the log knows, keys under which something has changed since the last call, the
        oldest first), in one round trip. `used` are records that were used, for the server's own policy."""
        with _told(self._reader, READ):
            pipe = self._reader.pipeline(transaction=False)
            if used:
                pipe.touch(*map(self.value, used))
            pipe.xrange(LOG, min=(self._last or NOTHING).decode())
            entries = pipe.execute(raise_on_error=False)[-1]  # a server may forbid to touch, which is no loss
            if isinstance(entries, Exception):
                raise entries
            # The newest entry that was read comes again, unless the log has lost it.
            comes_again = bool(entries) and entries[0][0] == self._last
            whole = self._last is None or (self._last != NOTHING and not comes_again)
            if whole and self._last is not None:
                entries = self._reader.xrange(LOG)
        self._last = entries[-1][0] if entries else NOTHING
        return whole, _named(entries[1:] if comes_again else entries)

    def all_keys(self) -> list[str]:
        """The keys of all records that are there, whether the log knows them or not; it takes a look at every key."""
        begins = self.value("").encode()
        with _told(self._reader, READ):
            names = [name.removeprefix(begins) for name in self._reader.scan_iter(match=self.value("*"), count=1000)]
        return sorted({name.decode() for name in names if KEY.fullmatch(name)})

    def look(self, keys: Sequence[str], known: Collection[str]) -> list[Found]:
        """What lies under each of some keys, without the heads of those that are `known`."""
        with _told(self._reader, READ):
            pipe = self._reader.pipeline(transaction=False)
            for key in keys:
                pipe.strlen(self.value(key))
                pipe.get(self._note(key))
                if key not in known:
                    pipe.getrange(self.value(key), 0, HEAD - 1)
            answers = iter(pipe.execute())
            found = [Found(next(answers), next(answers), b"" if key in known else next(answers)) for key in keys]
            longer = [i for i, each in enumerate(found) if head_nbytes(each.head) > len(each.head)]
            for i in longer:
                size = min(head_nbytes(found[i].head), found[i].nbytes)
                pipe.getrange(self.value(keys[i]), len(found[i].head), size - 1)
            for i, rest in zip(longer, pipe.execute() if longer else (), strict=True):
                found[i] = found[i]._replace(head=found[i].head + rest)
        return found

    def sizes(self, keys: Sequence[str]) -> list[int]:
        """Bytes of the values under some keys, 0 where there is none."""
        with _told(self._writer, 2 * WRITE):
            pipe = self._writer.pipeline(transaction=False)
            for key in keys:
                pipe.strlen(self.value(key))
            return list(pipe.execute())

    def read(self, key: str, nbytes: int) -> bytearray:
        """The value of so many bytes under a key. Raises FileNotFoundError where there is none, or another one."""
        out, at = bytearray(nbytes), 0
        if not nbytes:
            raise FileNotFoundError(f"nothing is known of {self.value(key)}")
        with _told(self._reader, READ):
            while at < nbytes:
                pipe = self._reader.pipeline(transaction=False)
                pipe.strlen(self.value(key))
                pipe.getrange(self.value(key), at, min(at + PIECE, nbytes) - 1)
                there, piece = pipe.execute()
                if there != nbytes or not piece:
                    raise FileNotFoundError(f"{self.name} does not have {self.value(key)} any more")
                out[at : at + len(piece)] = piece
                at += len(piece)
        return out

    # Writing

    def write(
        self, key: str, pieces: Sequence[bytes | memoryview], life: int | None, note: bytes | None,
        before: Mapping[str, int | None],
    ) -> None:  # fmt: skip
        """Write a value that lives for `life` milliseconds, None: for ever, and its note; one that is there stays.

        `before`: how long the records that it goes on from must live as well.
        """
        with _told(self._writer, 2 * WRITE):
            pipe = self._writer.pipeline(transaction=True)
            pipe.set(self.value(key), b"".join(pieces), px=life, nx=True)
            if note is not None:
                pipe.set(self._note(key), note, px=life)
            for each, its in before.items():
                self._live(pipe, each, its)
            self._say(pipe, key)
            pipe.execute()

    def write_note(self, key: str, note: bytes, life: int | None) -> None:
        """Write a note, and have the value live for `life` milliseconds from now on."""
        with _told(self._writer, 2 * WRITE):
            pipe = self._writer.pipeline(transaction=True)
            pipe.set(self._note(key), note, px=life)
            self._live(pipe, key, life)
            self._say(pipe, key)
            pipe.execute()

    def remove(self, keys: Sequence[str]) -> None:
        """Remove values and their notes."""
        with _told(self._writer, 2 * WRITE):
            pipe = self._writer.pipeline(transaction=False)
            for key in keys:
                pipe.unlink(self.value(key), self._note(key))
            gone = pipe.execute()
            for key, count in zip(keys, gone, strict=True):
                if count:
                    self._say(pipe, key)
            pipe.execute(raise_on_error=False)  # a server that is full removes, but has no room to say so

    def say(self, keys: Iterable[str]) -> None:
        """Tell other machines of records that are there."""
        with _told(self._writer, 2 * WRITE):
            pipe = self._writer.pipeline(transaction=False)
            for key in keys:
                self._say(pipe, key)
            pipe.execute(raise_on_error=False)  # as above

    def _live(self, pipe: Any, key: str, life: int | None) -> None:
        name = self.value(key)
        _ = pipe.persist(name) if life is None else pipe.pexpire(name, life)

    def _say(self, pipe: Any, key: str) -> None:
        if self._last == NOTHING:
            self._last = None  # it is empty no more, unless somebody empties it before the next look
        pipe.xadd(LOG, {"k": key}, maxlen=CHANGES, approximate=True)


def _named(entries: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> list[str]:
    """The keys that entries of the log name, each once."""
    named = (fields.get(b"k", b"") for _, fields in entries)
    return list(dict.fromkeys(key.decode() for key in named if KEY.fullmatch(key)))


@contextmanager
def _told(client: Any, within: float) -> Iterator[None]:
    """Say what went wrong as an OSError, and end what takes more than so many seconds: a socket's own limit begins anew
    with each byte that comes, and a client of the user's may have none."""
    from redis import exceptions

    done, late = threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(0.1 if late.is_set() else within):  # soon again, since clients try again
            late.set()
            client.connection_pool.disconnect()

    with suppress(RuntimeError):  # no thread begins while Python ends and the last records are written
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except Exception as e:
        if late.is_set():
            raise TimeoutError(f"it took more than {within:.0f} s") from e
        if isinstance(e, exceptions.RedisError):
            kinds = {exceptions.ResponseError: RefusedError, exceptions.TimeoutError: TimeoutError}
            raise next((ours for its, ours in kinds.items() if isinstance(e, its)), OSError)(str(e)) from e
        raise
    finally:
        done.set()


def _connected(remote: Any) -> tuple[Any, Any]:
    """Clients for reading, which gives up soon, and for writing. Raises ConfigError."""
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as e:
        raise ConfigError("remote needs the package redis; install it with: pip install 'octavo[redis]'") from e
    if isinstance(remote, redis.Redis):
        clients = remote, remote
    elif isinstance(remote, str):
        retry = Retry(NoBackoff(), 1, (redis.ConnectionError,))  # a connection may have been closed while it was idle
        try:
            clients = tuple(
                redis.Redis.from_url(remote, socket_connect_timeout=CONNECT, socket_timeout=seconds, retry=retry)
                for seconds in (ANSWER, WRITE)
            )
        except (ValueError, TypeError) as e:
            raise ConfigError(
                f"remote must be a URL such as redis://host:6379/0, rediss:// or unix:// (the one given: {e})"
            ) from None
    else:
        raise ConfigError(f"remote must be a URL or a redis.Redis, not {type(remote).__name__}")
    if clients[0].connection_pool.connection_kwargs.get("decode_responses"):
        raise ConfigError("remote must be a redis.Redis without decode_responses, since records are bytes")
    return clients

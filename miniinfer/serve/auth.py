"""Who may use the server, and how much: API keys from the command line or a file, with rates and priorities.

Owns the keys' file format, the comparison, and the counting of a key's requests and tokens. What a refusal looks like, and which routes ask, is
admission.py's. Keys are kept as digests only: no log line and no traceback can show one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from miniinfer.config import ConfigError, ServerConfig

SHORTEST_FILED = 8  # characters of a key in a file
OPTION = "--api-key "  # begins the names of keys from the command line


class KeyEntry(msgspec.Struct, forbid_unknown_fields=True):
    """One entry of `keys` in a keys file."""

    key: str
    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and output together
    priority: int = 0  # as a request's own: 30 s later for each, so higher numbers yield

    def __post_init__(self) -> None:
        if len(self.key) < SHORTEST_FILED or not self.key.isascii() or not self.key.isprintable() or self.key != self.key.strip():
            raise ValueError(f"a key must have at least {SHORTEST_FILED} printable ASCII characters and no blank at its ends")
        if not self.name:
            raise ValueError("name must not be empty")
        for field in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        if abs(self.priority) >= 2**31:
            raise ValueError("priority must fit into 32 bits")


class KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    """A keys file: TOML (`[[keys]]`) or JSON (`{"keys": [...]}`)."""

    keys: list[KeyEntry]


class Allowance:
    """So much a minute: a bucket that holds a minute's worth and fills evenly. May be overdrawn by what is known only afterwards."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._left, self._at = float(per_minute), clock()

    def wait(self, amount: float) -> float:
        """Seconds until `amount` may be taken, 0 if now. More than a full bucket holds may be taken when it is full."""
        now = self._clock()
        self._left = min(self.per_minute, self._left + (now - self._at) * self.per_minute / 60)
        self._at = now
        return max(0.0, (min(amount, self.per_minute) - self._left) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        self._left -= amount


class Client:
    """Whoever holds one key."""

    def __init__(self, entry: KeyEntry, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.priority = entry.name, entry.priority
        # Whose files are whose, on disk too. A name outlives a change of its key; keys of the command line are numbered anew at every start.
        self.owner = f"key {_digest(b'owner ' + entry.key.encode()).hex()[:32]}" if entry.name.startswith(OPTION) else f"name {entry.name}"
        self.requests = Allowance(entry.requests_per_minute, clock) if entry.requests_per_minute else None
        self.tokens = Allowance(entry.tokens_per_minute, clock) if entry.tokens_per_minute else None

    def pace(self) -> float:
        """Seconds until half of a minute's requests and tokens are there: the half that requests in the background leave to others."""
        return max((allowed.wait(max(1, allowed.per_minute // 2)) for allowed in (self.requests, self.tokens) if allowed is not None), default=0.0)


class Keys:
    """All keys. A look-up takes the same time whichever key matches, or none."""

    def __init__(self, entries: list[KeyEntry], clock: Callable[[], float] = time.monotonic) -> None:
        self._clients = [(_digest(entry.key.encode()), Client(entry, clock)) for entry in entries]

    def find(self, key: bytes) -> Client | None:
        """Whose key this is."""
        digest, found = _digest(key), None
        for known, client in self._clients:
            if hmac.compare_digest(digest, known):
                found = client
        return found

    def of(self, owner: str) -> Client | None:
        """The client who is this owner of files."""
        return next((client for _, client in self._clients if client.owner == owner), None)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def load_keys(config: ServerConfig) -> Keys | None:
    """The keys that the options name; None if there are none and the server is open. ConfigError that names the file and the entry."""
    if not config.guarded:
        return None
    entries = [_option(key, number) for number, key in enumerate(config.api_key or [], 1)]
    if config.api_keys_file is not None:
        entries += _read(Path(config.api_keys_file))
    seen: set[str] = set()
    for entry in entries:
        if entry.key in seen:
            raise ConfigError(f"api_keys_file: the key of {entry.name!r} is there twice; every key must be one client's")
        seen.add(entry.key)
    return Keys(entries)


def _option(key: str, number: int) -> KeyEntry:
    """A key from the command line, without limits."""
    entry = KeyEntry("x" * SHORTEST_FILED, f"{OPTION}{number}")
    entry.key = key
    return entry


def _read(path: Path) -> list[KeyEntry]:
    try:
        text = path.read_text(encoding="utf-8")
        raw: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as e:
        raise ConfigError(f"api_keys_file: cannot read {path}: {e.strerror}") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        where = f"line {e.lineno}" if isinstance(e, json.JSONDecodeError) else "" if isinstance(e, UnicodeDecodeError) else str(e)
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"api_keys_file: {path} is not valid {kind} {where}".rstrip()) from None
    try:
        entries = msgspec.convert(raw, KeyFile, strict=True).keys
    except msgspec.ValidationError as e:
        raise ConfigError(f"api_keys_file: {path}: {e}") from None
    if not entries:
        raise ConfigError(f"api_keys_file: {path} has no keys, so nobody could use the server; add one, or leave the option out")
    return entries

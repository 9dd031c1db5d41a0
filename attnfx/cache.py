"""Keep values between processes in small JSON files in the user's cache directory.

The program never depends on the cache: a damaged file is rebuilt, and an unwritable directory is ignored, each with one
warning. A file is replaced as a whole, under a lock. So concurrent processes keep each other's entries, and readers
never see a partial file.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_dir

VERSION = 1  # of the file format
WAIT = 10.0  # seconds for another process's lock

_lock = threading.Lock()
_warned: set[tuple[Path, str]] = set()
_unwritten: dict[Path, dict[str, Any]] = {}  # by file: entries that this process could not write


def directory() -> Path:
    """Return the cache directory: ATTNFX_CACHE_DIR, or the user's cache directory. It need not exist."""
    return Path(os.environ.get("ATTNFX_CACHE_DIR") or user_cache_dir("attnfx"))


def key_of(**parts: Any) -> str:
    """Build a readable key from JSON values; their order makes no difference."""
    return json.dumps(parts, sort_keys=True)


class JsonCache:
    """A file of entries, key -> JSON value. Its methods warn about errors on disk instead of raising.

    The directory is looked up at each call, so that ATTNFX_CACHE_DIR may change. An entry that cannot be written is
    kept in memory for this process.
    """

    def __init__(self, name: str):
        self.name = name

    @property
    def path(self) -> Path:
        return directory() / f"{self.name}.json"

    def get(self, key: str) -> Any:
        """Return the value of a key, or None."""
        return self.entries().get(key)

    def entries(self) -> dict[str, Any]:
        """Return all entries, newest last."""
        return {**self._read(), **_unwritten.get(self.path, {})}

    def put(self, key: str, value: Any) -> None:
        """Store a value. Raises TypeError if it is not a JSON value."""
        json.dumps(value)
        path = self.path
        try:
            with self._locked():
                entries = self._read()
                entries.pop(key, None)
                _replace(path, json.dumps({"version": VERSION, "entries": {**entries, key: value}}, indent=1) + "\n")
        except (OSError, NotImplementedError) as problem:  # NotImplementedError: a file system without locks
            why = f"cannot be written ({problem}), so new entries last for this process only; set ATTNFX_CACHE_DIR"
            _warn(path.parent, f"{why} to another folder to keep them")
            with _lock:
                _unwritten.setdefault(path, {})[key] = value
        else:
            with _lock:
                _unwritten.get(path, {}).pop(key, None)

    def clear(self) -> int:
        """Delete all entries and return their number."""
        count = len(self.entries())
        _unwritten.pop(self.path, None)
        try:
            if self.path.exists():
                with self._locked():
                    self.path.unlink(missing_ok=True)
        except (OSError, NotImplementedError) as problem:
            _warn(self.path, f"cannot be removed ({problem})")
        return count

    def _locked(self) -> FileLock:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return FileLock(f"{self.path}.lock", timeout=WAIT)

    def _read(self) -> dict[str, Any]:
        path = self.path
        try:
            found = path.stat()
            return dict(_parsed(path, found.st_mtime_ns, found.st_size, found.st_ino))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as problem:
            _warn(path, f"cannot be read and is rebuilt ({problem})")
            return {}


@lru_cache(maxsize=64)
def _parsed(path: Path, *_: int) -> dict[str, Any]:
    """Parse the file's entries; the other arguments only key the lru_cache. Raises OSError or ValueError."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not isinstance(data.get("entries"), dict):
        raise ValueError("it lacks the object 'entries'")
    return data["entries"] if data.get("version") == VERSION else {}


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _warn(path: Path, what: str) -> None:
    with _lock:
        if (path, what) in _warned:
            return
        _warned.add((path, what))
    warnings.warn(f"attnfx: the cache {path} {what}", RuntimeWarning, stacklevel=4)

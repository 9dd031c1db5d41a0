"""Import generated source as a module, from a file in a directory that only the user can write.

Triton compiles functions from their source files, so a file is required. The source is always generated from the spec.
An existing file is used only if its content is identical, byte for byte.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

from attnfx import cache

_lock = threading.Lock()


def directory() -> Path:
    """Return the directory for generated modules, under `cache.directory()`. Create it with mode 0700 if needed.

    Raise PermissionError if it is a link, or another user owns it or may write to it.
    """
    root = cache.directory() / "triton"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check(root)
    return root


def _check(path: Path) -> None:
    found = path.lstat()
    owner = getattr(os, "getuid", lambda: found.st_uid)()
    if stat.S_ISLNK(found.st_mode):
        raise PermissionError(f"{path} is a symbolic link; set ATTNFX_CACHE_DIR to a folder of yours")
    if found.st_uid != owner:
        raise PermissionError(f"{path} belongs to another user; set ATTNFX_CACHE_DIR to a folder of yours")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{path} can be written by other users; make it private, or set ATTNFX_CACHE_DIR to a private folder"
        )


def load(text: str, where: Path | None = None) -> ModuleType:
    """Import the module with this source. Raise PermissionError as `directory` does."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:20]
    name = f"attnfx_program_{digest}"
    with _lock:
        if name not in sys.modules:
            folder = directory() if where is None else where
            _check(folder)
            file = folder / f"{name}.py"
            if not _holds(file, text):
                _write(file, text)
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            # not through the loader, which might run byte code that another process put next to the file
            sys.modules[name] = module
            try:
                exec(compile(text, str(file), "exec"), module.__dict__)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]


def _holds(file: Path, text: str) -> bool:
    try:
        _check(file)
        return file.read_bytes() == text.encode()
    except (OSError, PermissionError):
        return False


def _write(file: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(text.encode())
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise

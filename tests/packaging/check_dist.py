"""Install the wheel and the sdist, each into a clean environment, and use them from outside of the checkout.

    python tests/packaging/check_dist.py [--download] dist/attnfx-*.whl dist/attnfx-*.tar.gz

A clean environment holds only attnfx and the packages that its metadata requires. By default these packages are links
into the environment that runs this script, so nothing large is downloaded or copied. With --download, pip installs the
newest versions that the metadata allows.

An archive passes if it holds every file of attnfx/, every module can be imported, the first example of README.md runs,
and the command `attnfx` explains a model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]

IMPORT_ALL = """
import importlib, importlib.metadata, pkgutil, sys
from pathlib import Path
import attnfx

for module in pkgutil.walk_packages(attnfx.__path__, "attnfx."):
    if not module.name.endswith("__main__"):
        found = importlib.import_module(module.name)
        assert Path(found.__file__).is_relative_to(sys.prefix), f"{found.__file__} is not from the clean environment"
assert attnfx.__version__ == importlib.metadata.version("attnfx") == sys.argv[1], attnfx.__version__
"""

REPORTED = """
import attnfx

(site,) = attnfx.reports()[-1].sites
assert site.decision is not None, site
"""

MODEL = """
import torch


def attend(query, key, value):
    return (query @ key.transpose(-2, -1) / 8).softmax(-1) @ value


def example():
    return attend, tuple(torch.randn(2, 8, 512, 64) for _ in range(3))
"""


class Archive:
    """A wheel or an sdist.

    names    its files, as paths below the sdist's one folder or the wheel's root
    version  the version in its metadata
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                self.names = set(wheel.namelist())
                metadata = wheel.read(next(n for n in self.names if n.endswith(".dist-info/METADATA")))
        else:
            with tarfile.open(path) as sdist:
                files = [m for m in sdist.getmembers() if not m.isdir()]
                assert all(m.isfile() for m in files), "the sdist holds a link"
                self.names = {m.name.partition("/")[2] for m in files}
                info = next(m for m in files if PurePosixPath(m.name).match("*/PKG-INFO") and m.name.count("/") == 1)
                metadata = sdist.extractfile(info).read()  # type: ignore[union-attr]
        self.metadata = message_from_bytes(metadata)
        self.version = self.metadata["Version"]

    @property
    def requirements(self) -> list[str]:
        return self.metadata.get_all("Requires-Dist") or []


def package_files() -> set[str]:
    """The files of attnfx/ in the checkout, the linked folders included."""
    found = set()
    for folder, folders, files in os.walk(ROOT / "attnfx", followlinks=True):
        folders[:] = [f for f in folders if f != "__pycache__"]
        found.update((Path(folder) / f).relative_to(ROOT).as_posix() for f in files)
    return found


def check_contents(archive: Archive) -> None:
    held = {n for n in archive.names if n.startswith("attnfx/")}
    expected = package_files()
    assert held == expected, f"{archive.path.name} lacks {sorted(expected - held)}, adds {sorted(held - expected)}"
    assert "attnfx/py.typed" in held
    licenses = [n for n in archive.names if PurePosixPath(n).name == "LICENSE"]
    assert licenses, f"{archive.path.name} lacks the license"


# -- a clean environment -----------------------------------------------------------------------------
def closure(requirements: list[str]) -> Iterator[str]:
    """The names of all distributions that these requirements need here, from the metadata of those installed."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    seen: set[tuple[str, str]] = set()
    left = [(text, "") for text in requirements]
    while left:
        text, extra = left.pop()
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(needed.name)
        version = distribution(name).version
        assert needed.specifier.contains(version, prereleases=True), f"{text} is required, {version} is in {sys.prefix}"
        for wanted in ("", *needed.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                left += [(r, wanted) for r in distribution(name).requires or ()]
    yield from sorted({name for name, _ in seen})


def link(name: str, packages: Path) -> None:
    """Link a distribution of this environment into another site-packages folder: its packages, modules and metadata."""
    found = distribution(name)
    for file in found.files or ():
        top = Path(str(found.locate_file(file.parts[0])))
        whole = top.suffix == ".dist-info" or (top / "__init__.py").exists()
        source, target = (top, packages / top.name) if whole else (found.locate_file(file), packages / file)
        if file.parts[0] != ".." and not target.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(Path(str(source)))


def run(*command: object, cwd: Path, caches: Path) -> str:
    """Run a command without access to the checkout, and return its output."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "ATTNFX_", "TORCH")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    kept |= {"ATTNFX_CACHE_DIR": str(caches / "attnfx"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=kept, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nexited with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def first_example() -> str:
    """The first Python block of README.md."""
    found = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, "README.md has no example"
    return found[1]


def check(archive: Archive, home: Path, caches: Path, download: bool) -> None:
    """Check one archive in the new folder `home`."""
    started = time.perf_counter()
    check_contents(archive)
    venv.create(home / "venv", symlinks=True)
    python, command = home / "venv/bin/python", home / "venv/bin/attnfx"
    (packages,) = (home / "venv/lib").glob("python*/site-packages")
    if not download:
        for name in closure(archive.requirements):
            link(name, packages)
    before = {p.name for p in packages.glob("*.dist-info")}
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", archive.path, cwd=home, caches=caches)
    added = {p.name for p in packages.glob("*.dist-info")} - before
    assert download or added == {f"attnfx-{archive.version}.dist-info"}, f"pip installed {sorted(added)}"
    run(*pip, "check", cwd=home, caches=caches)

    run(python, "-c", IMPORT_ALL, archive.version, cwd=home, caches=caches)
    (home / "first.py").write_text(first_example() + REPORTED)
    run(python, "first.py", cwd=home, caches=caches)
    (home / "model.py").write_text(MODEL)
    explain = (command, "explain", "model.py:example", "--target", "h100-sxm", "--json", "--html", "report.html")
    report = json.loads(run(*explain, cwd=home, caches=caches))
    assert len(report["sites"]) == 1, report
    assert (home / "report.html").stat().st_size > 1000
    print(f"{archive.path.name}: installed and used in {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("archives", nargs="+", type=Path)
    parser.add_argument("--download", action="store_true", help="let pip install the packages that attnfx requires")
    args = parser.parse_args()
    archives = [Archive(a.resolve()) for a in args.archives]
    assert len({a.version for a in archives}) == 1, "archives of several versions: remove dist/ and build again"
    with tempfile.TemporaryDirectory(prefix="attnfx-dist-") as folder:
        # Each environment has the same path, so that Inductor compiles the example's C++ once.
        home, caches = Path(folder).resolve() / "home", Path(folder).resolve() / "caches"
        for archive in archives:
            home.mkdir()
            check(archive, home, caches, args.download)
            shutil.rmtree(home)


if __name__ == "__main__":
    main()

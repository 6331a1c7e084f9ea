#!/usr/bin/env python3
"""Compile the modules of the request path with mypyc, in place: `python tools/compile_modules.py`.

The modules, [tool.ploopd] compile in pyproject.toml, are ordinary Python and run as such where
there is no compiler; compiled they are faster (docs/decisions/compiled.md).  Python prefers an
extension module to a source file, so what is out of date must go: it is compiled again, or removed.

    --remove       take the extension modules away
    --tidy         take them away if they are out of date
    --output DIR   put them below DIR instead

A machine without compiler or Python's headers is told so and goes on without (exit status 0).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
GROUP = "ploopd"
LIBRARY = f"{GROUP}__mypyc{SUFFIX}"
"""What all of them share; each extension module only opens it."""
STAMP = ROOT / f"{GROUP}__mypyc.sha256"


def modules() -> list[str]:
    """Paths of the source files, relative to the project."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: list[str] = tomllib.load(file)["tool"]["ploopd"]["compile"]
    return found


def built(place: Path) -> list[Path]:
    """Where the extension modules go, the library they share first."""
    return [place / LIBRARY, *((place / name).with_suffix(SUFFIX) for name in modules())]


def digest() -> str:
    """Changes with every source file, this program and the interpreter."""
    found = hashlib.sha256(f"{sys.version}\n{SUFFIX}\n".encode())
    for name in [*modules(), "pyproject.toml", "tools/compile_modules.py"]:
        found.update(f"{name}\n".encode())
        found.update((ROOT / name).read_bytes())
    return found.hexdigest()


def up_to_date() -> bool:
    """Whether all of them are there, made of the sources as they are now."""
    if not all(path.exists() for path in built(ROOT)):
        return False
    return STAMP.exists() and STAMP.read_text() == digest()


def remove() -> None:
    """Take away every extension module of the project."""
    STAMP.unlink(missing_ok=True)
    for top in ("ploopd", "image_format", "scst_shim"):
        for path in (ROOT / top).rglob(f"*{SUFFIX}"):
            path.unlink()
    (ROOT / LIBRARY).unlink(missing_ok=True)


def no_compiler() -> str | None:
    """What is missing here, or None."""
    compiler = os.environ.get("CC", sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"no C compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no headers of Python (Debian: python3-dev)"
    return None


def build(place: Path) -> None:
    """Compile everything and put it below `place`.

    Raises SystemExit where mypy finds an error, `setuptools`' errors where the compiler does.
    """
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    with tempfile.TemporaryDirectory(prefix="ploopd-compile.") as temporary:
        cwd = Path.cwd()
        os.chdir(ROOT)  # mypy names a module by its path from here
        try:
            extensions = mypycify(
                modules(),
                opt_level="2",
                debug_level="0",
                multi_file=True,
                group_name=GROUP,
                target_dir=f"{temporary}/c",
            )
        finally:
            os.chdir(cwd)
        command = build_ext(Distribution({"name": GROUP, "ext_modules": extensions}))
        command.build_lib = f"{temporary}/lib"
        command.build_temp = f"{temporary}/o"
        command.parallel = os.cpu_count()
        command.ensure_finalized()
        command.run()
        for path in built(place):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place: a running daemon has the old one mapped.
            new = path.with_suffix(".new")
            shutil.copyfile(Path(temporary, "lib", path.relative_to(place)), new)
            new.rename(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--remove", action="store_true")
    parser.add_argument("--tidy", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.remove or arguments.tidy:
        if arguments.remove or not up_to_date():
            remove()
        return 0
    in_place = arguments.output is None
    if in_place:
        if up_to_date():
            return 0
        remove()
    if missing := no_compiler():
        print(f"{missing}: the request path is not compiled but slower", file=sys.stderr)
        return 0
    print("Compiling the request path, which takes half a minute ...", file=sys.stderr, flush=True)
    build(arguments.output or ROOT)
    if in_place:
        STAMP.write_text(digest())
    return 0


if __name__ == "__main__":
    sys.exit(main())

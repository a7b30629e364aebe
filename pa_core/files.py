"""Where things lie, the one atomic write, the one lock between processes and the one YAML reader."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from pa_core.errors import ParameterError, RunError


def home() -> Path:
    """The repository's root when pa_core is used from a checkout, else the working directory."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def shown(path: Path) -> str:
    """A path as it is printed: within the repository from its root, so that a notebook names no home folder."""
    return path.relative_to(home()).as_posix() if path.is_relative_to(home()) else str(path)


def data_home() -> Path:
    """Where downloads and image caches lie: ``$PA_DATA``, else ``data/``; a relative one in the repository."""
    return home() / Path(os.environ.get("PA_DATA") or "data").expanduser()


def runs_home(runs_dir: str = "runs") -> Path:
    """The folder of runs: ``"runs"`` is ``$PA_RUNS``, else ``runs/``, in the repository; another is where one works."""
    if runs_dir == "runs":
        return home() / Path(os.environ.get("PA_RUNS") or "runs").expanduser()
    return Path(runs_dir).expanduser().absolute()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path``; what is written there takes its place whole, or RunError, as on a full disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        text = f"{shown(path)} cannot be written ({error.strerror}); what was there before is intact"
        raise RunError(text) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A file's names and values, ``{}`` where there is no file; RunError where it is damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise RunError(f"{shown(path)} is damaged ({error})") from error


@contextmanager
def lock(path: Path, waiting: str, log: Callable[[str], None] = print) -> Iterator[None]:
    """Hold a lock between processes; ``waiting`` is logged once if another one holds it. A killed holder loses it."""
    file = FileLock(path)
    try:
        held = file.acquire(timeout=0)
    except Timeout:
        log(waiting)
        held = file.acquire()
    with held:
        yield


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is refused instead of the first being forgotten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice below line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Names and values of a YAML file, an empty file has none; ParameterError where it holds anything else."""
    try:
        content = yaml.load(Path(path).read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        allowed = f"must be a YAML file that can be read ({' '.join(str(error).split())})"
        raise ParameterError("file", str(path), allowed) from error
    if not isinstance(content, dict | None):
        raise ParameterError("file", str(path), "must hold lines of names and values, such as 'lr: 1e-3'")
    return content or {}

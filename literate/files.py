"""Writing that leaves every file either old or new."""

from __future__ import annotations

import os
from pathlib import Path

from literate.myst import SourceError


def commit(root: Path, changes: dict[Path, str | None]) -> list[Path]:
    """Write the texts (`None` removes a file) and return what changed; a failure restores what was there.

    Every text is first written beside its target, so that most failures come before the first change.
    """
    old = {path: path.read_bytes() if path.exists() else None for path in changes}
    new = {path: None if text is None else text.encode() for path, text in changes.items()}
    pending = [path for path in changes if new[path] != old[path]]
    current = root
    try:
        for current in pending:
            if (data := new[current]) is not None:
                current.parent.mkdir(parents=True, exist_ok=True)
                _beside(current).write_bytes(data)
        done: list[Path] = []
        try:
            for current in pending:
                _put(current, new[current])
                done.append(current)
        except BaseException:
            for path in done:
                if (data := old[path]) is not None:
                    _beside(path).write_bytes(data)
                _put(path, old[path])
            raise
    except OSError as error:
        name = os.path.relpath(current, root)
        reason = error.strerror or error
        raise SourceError(name, 1, f"cannot be written ({reason}); nothing was changed, mend that and rerun") from None
    finally:
        for path in pending:
            if _beside(path).is_file():
                _beside(path).unlink()
    return pending


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _put(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    else:
        os.replace(_beside(path), path)

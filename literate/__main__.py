"""`python -m literate tangle | weave | untangle | check | locate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from literate.myst import SourceError
from literate.source import Book


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 is success, 1 a finding or a failed cell, 2 malformed input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m literate", description="Keep chapters, package and notebooks one.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = verbs.add_parser("tangle", help="write the package from the chapters")
    verb.add_argument("--force", action="store_true", help="overwrite package files that were edited by hand")
    verb.set_defaults(run=_tangle)
    return parser


def _tangle(options: argparse.Namespace) -> int:
    from literate.tangle import tangle

    book = Book.load()
    changed = tangle(book, force=options.force)
    for path in changed:
        print(f"{'wrote' if path.exists() else 'removed'} {path.relative_to(book.root)}")
    if not changed:
        print("the package is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())

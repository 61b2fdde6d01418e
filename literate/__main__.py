"""`python -m literate tangle | weave | untangle | check | race | locate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from literate.myst import SourceError
from literate.source import Book


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 is success, 1 a finding or a failed cell, 2 malformed input, 130 an interruption."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; every file is the old or the new one, a rerun completes", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m literate", description="Keep chapters, package and notebooks one.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = verbs.add_parser("tangle", help="write the package from the chapters")
    verb.add_argument("--force", action="store_true", help="overwrite package files that were edited by hand")
    verb.set_defaults(run=_tangle)

    verb = verbs.add_parser("weave", help="write and execute the notebooks (tangles first)")
    verb.add_argument("chapters", nargs="*", metavar="CHAPTER", help="01, 01_steepest_descent or its file")
    verb.add_argument("--all", action="store_true", dest="everything", help="execute also what is not stale")
    verb.add_argument("--jobs", type=int, default=0, metavar="N", help="chapters at a time (default: number of cores)")
    verb.add_argument("--force", action="store_true", help="overwrite generated files that were edited by hand")
    verb.set_defaults(run=_weave)

    verb = verbs.add_parser("untangle", help="carry edits made in the package back into the chapters")
    verb.set_defaults(run=_untangle)

    verb = verbs.add_parser("check", help="find where chapters, package and notebooks disagree")
    verb.set_defaults(run=_check)

    verb = verbs.add_parser("race", help="run the race of the front page (minutes; weave does it when it is stale)")
    verb.set_defaults(run=_race)

    verb = verbs.add_parser("locate", help="the chapter line behind a package line, or the reverse")
    verb.add_argument("place", metavar="FILE:LINE")
    verb.set_defaults(run=_locate)
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


def _weave(options: argparse.Namespace) -> int:
    from literate import front
    from literate.tangle import tangle
    from literate.weave import select, summary, weave

    book = Book.load()
    chapters = select(book, options.chapters)
    tangle(book, force=options.force)
    results = weave(book, chapters, everything=options.everything, jobs=options.jobs, force=options.force)
    print(summary(results))
    failures = [result.failure for result in results if result.failure]
    if not failures and not options.chapters and front.shown(book) and front.stale(book):
        from literate.race import run

        run(book)
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    return 1 if failures else 0


def _untangle(options: argparse.Namespace) -> int:
    from literate.untangle import untangle

    edits = untangle(Book.load())
    for edit in edits:
        print(f"{edit.file}:{edit.line} -> {edit.chapter.file}:{edit.export.line}")
    if not edits:
        print("nothing to carry back")
    return 0


def _check(options: argparse.Namespace) -> int:
    from literate.check import check

    findings = check(Book.load())
    for finding in findings:
        print(finding)
    print(f"{len(findings)} to mend" if findings else "chapters, package and notebooks agree")
    return 1 if findings else 0


def _race(options: argparse.Namespace) -> int:
    from literate.race import run

    run(Book.load())
    return 0


def _locate(options: argparse.Namespace) -> int:
    from literate.locate import locate

    print(locate(Book.load(), options.place))
    return 0


if __name__ == "__main__":
    sys.exit(main())

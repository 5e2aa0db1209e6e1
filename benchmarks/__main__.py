"""``python -m benchmarks run | table | plot | compare | choose | readme``; each has ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks import choice, compare, report, sweep
from benchmarks.cases import suite
from benchmarks.record import read


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="otkern beside its peers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_run(commands.add_parser("run", help="measure a suite; the same command continues a stopped run"))
    add_reading(commands)
    options = parser.parse_args(arguments)
    return options.function(options)


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=("quick", "cpu", "gpu", "training"), required=True)
    parser.add_argument("--json", type=Path, required=True, help="the file of results, written after each case")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name contains or matches this")
    parser.add_argument("--method", action="append", default=[], metavar="NAME=MODULE:CLASS", help="a further method")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--seconds", type=float, default=6.0, help="of samples for each case, about (default 6)")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for one step of one method (default 180)")
    parser.add_argument("--minutes", type=float, help="begin no further case after so long")
    parser.add_argument("--restart", action="store_true", help="measure anew what the file holds")
    parser.set_defaults(function=do_run)


def do_run(options: argparse.Namespace) -> int:
    gpu = torch.cuda.is_available()
    if options.suite == "gpu" and not gpu:
        print("the gpu suite needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    device = "cuda" if options.suite == "gpu" or (options.suite == "training" and gpu) else "cpu"
    settings = sweep.Settings(
        suite=options.suite, path=options.json, device=device, threads=options.threads, seconds=options.seconds,
        limit=options.limit, only=options.only, minutes=options.minutes, restart=options.restart,
        candidates=dict(entry.split("=", 1) for entry in options.method),
    )  # fmt: skip
    try:
        result = sweep.run(settings, suite(options.suite, device))
    except sweep.Refused as reason:
        print(reason, file=sys.stderr)
        return 2
    print(report.text(result))
    if wrong := sweep.wrong(result):
        print("\nfailed:\n  " + "\n  ".join(wrong), file=sys.stderr)
    return int(bool(wrong))


def add_reading(commands) -> None:
    parser = commands.add_parser("table", help="print the records of a file")
    parser.add_argument("file", type=Path)
    parser.set_defaults(function=do_table)
    parser = commands.add_parser("plot", help="draw the records of files")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"))
    parser.set_defaults(function=do_plot)
    parser = commands.add_parser("compare", help="regressions of NEW against OLD; exit status 1 if there is one")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.set_defaults(function=do_compare)
    parser = commands.add_parser("choose", help="write the table that otkern chooses between CUDA and Triton by")
    parser.add_argument("file", type=Path, help="a run of the gpu suite")
    parser.add_argument("--table", type=Path, default=choice.TABLE, help="default: the one of this checkout")
    parser.set_defaults(function=do_choose)
    parser = commands.add_parser("readme", help="write the tables of README.md and docs from benchmarks/results")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a table differs")
    parser.set_defaults(function=do_readme)


def do_table(options: argparse.Namespace) -> int:
    print(report.text(read(options.file)))
    return 0


def do_plot(options: argparse.Namespace) -> int:
    from benchmarks import plots

    for path in plots.draw([read(file) for file in options.files], options.output_dir):
        print(path)
    return 0


def do_compare(options: argparse.Namespace) -> int:
    lines, regressions = compare.compare(read(options.old), read(options.new))
    print("\n".join(lines))
    return int(regressions > 0)


def do_choose(options: argparse.Namespace) -> int:
    try:
        entry = choice.write(read(options.file), options.table)
    except ValueError as reason:
        print(reason, file=sys.stderr)
        return 2
    print(choice.text(entry))
    return 0


def do_readme(options: argparse.Namespace) -> int:
    changed = report.update_documents(write=not options.check)
    for path in changed:
        print(f"{path} {'differs from' if options.check else 'now shows'} benchmarks/results")
    return int(bool(changed) and options.check)


if __name__ == "__main__":
    sys.exit(main())

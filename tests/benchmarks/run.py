"""Measures the benchmarks, each case in a process of its own, and writes their records and docs/benchmarks.md.

    python tests/benchmarks/run.py all --quick
    python tests/benchmarks/run.py steps --model gpt2 smollm2 --max_length 512 1024 --write-docs
    python tests/benchmarks/run.py steps --help
    python tests/benchmarks/run.py page       # writes docs/benchmarks.md from the records again

NAME has a module in this folder, which declares its cases and options. A full benchmark takes minutes to hours and
wants an idle machine; --quick takes seconds, with numbers that mean nothing.
"""

import argparse
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:] = [str(TESTS), *(place for place in sys.path if place != str(TESTS / "benchmarks"))]

from benchmarks.benchmark import (  # noqa: E402
    MODELS,
    PAGE,
    Benchmark,
    become_child,
    build_page,
    build_table,
    run_benchmark,
    write_record,
)
from benchmarks.elsewhere import ELSEWHERE  # noqa: E402

# In the order of the page.
NAMES = (
    *(
        "steps",
        "answers",
        "balance",
        "preparation",
        "startup",
        "evaluate",
        "stall",
        "recover",
        "faults",
        "plan",
        "report",
    ),
    *("merge", "serve", "sweep", "rounding", "threads"),
)
MEASURED = [name for name in NAMES if name not in ELSEWHERE]


def load_benchmark(name: str) -> Benchmark:
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
    return replace(benchmark, command=f"python tests/benchmarks/run.py {name}")


def build_parser(name: str) -> argparse.ArgumentParser:
    """The flags of one benchmark; with `all` the flags that all have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [*MEASURED, "all", "page"]
    parser.add_argument("name", metavar="NAME", choices=names, help=f"{', '.join(MEASURED)}, or all, or page")
    parser.add_argument("--quick", action="store_true", help="small shapes, in seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to this file")
    parser.add_argument("--write-docs", action="store_true", help="write docs/benchmarks/NAME.json and the page")
    parser.add_argument("--rounds", type=int)
    if name in MEASURED:
        benchmark = load_benchmark(name)
        parser.add_argument("--cases", nargs="+", choices=benchmark.cases)
        for key, default in {**benchmark.options, **benchmark.axes}.items():
            several = {"nargs": "+"} if key in benchmark.axes else {}
            choices = MODELS if key == "model" else None
            kind = type(default[0] if several else default)
            parser.add_argument(f"--{key}", type=kind, choices=choices, help=f"default: {default}", **several)
    return parser


def write_page() -> None:
    PAGE.write_text(build_page({name: load_benchmark(name) for name in NAMES}))


def main(argv: list[str]) -> int:
    """Returns 1 if a case failed."""
    if argv[:1] == ["--child"]:
        become_child(load_benchmark(argv[1]), argv[2])
        return 0
    if argv == ["page"]:
        write_page()
        return 0
    parser = build_parser(argv[0] if argv else "")
    flags = vars(parser.parse_args(argv))
    if flags["quick"] and flags["write_docs"]:
        parser.error("--quick measures nothing that belongs into the documentation: omit it, or --write-docs")
    measurements = {}
    for name in MEASURED if flags["name"] == "all" else [flags["name"]]:
        benchmark = load_benchmark(name)
        settings = benchmark.default_settings(quick=flags["quick"])
        settings |= {key: flags[key] for key in settings if flags.get(key) is not None}
        measurements[name] = run_benchmark(name, benchmark, settings, quick=flags["quick"])
        print(f"{build_table(benchmark, measurements[name]['rows'])}\n", flush=True)
        if flags["json"]:
            flags["json"].write_text(json.dumps(measurements, indent=2) + "\n")
        if flags["write_docs"] and measurements[name]["rows"]:
            write_record(name, benchmark, measurements[name])
            write_page()
    failed = [f"{name}: {case}" for name, measured in measurements.items() for case in measured["failed"]]
    for title in failed:
        print(f"failed: {title}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

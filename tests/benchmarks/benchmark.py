"""Shared by all benchmarks: cases in processes of their own, medians of rounds, tables, records, and the page.

A module of this folder declares one `BENCHMARK`; run.py runs it. Its record, docs/benchmarks/NAME.json, is a list of
measurements, each with date, machine, command, versions and rows. docs/benchmarks.md is written from the records.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
RUN = Path(__file__).with_name("run.py")
RECORDS = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
PACKAGES = ("torch", "transformers", "trl", "dpokit")
# glibc keeps freed memory, on both sides of a comparison: else much of a CPU step is page faults.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
HEAD = """# Benchmarks

{hardware}Each section names its command, date and machine.
`python tests/benchmarks/run.py NAME --write-docs` measures one again, and writes its record in `docs/benchmarks/` and
this page.
"""
MODELS = {
    "gpt2": "GPT-2 124M",
    "qwen2": "Qwen2 0.5B",
    "llama": "Llama 0.3B",
    "smollm2": "SmolLM2-135M",
    "tiny": "a tiny Llama",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A table of measurements.

    Attributes:
        title: heading of its section.
        about: what is measured and how, in Markdown.
        columns: {key of a row: (heading, format)}; a column without a value in any row is left out.
        cases: {name: title}. A row's `case` is the title.
        measure: measures one case, in its own process. It gets the options as attributes, and `case` (its name),
            `folder` (shared by all cases) and `output` (of this case). Returns the numbers and texts of the row. Lists
            of numbers named `numbers` are compared with those of the baseline.
        prepare: writes models and data into `folder`, in a process of its own; gets the options, and axes as lists.
        options: {flag: default}.
        axes: {flag: default values}; every case is measured with every combination of them.
        quick: options, axes and `cases` that take seconds, to try the benchmark.
        baseline: name of the case to which the `seconds` of others are compared.
        speed: whether `relative` is the baseline's seconds divided by a case's; else it is the inverse.
        rounds: how often each case is measured, in turns; the median of each number counts.
        cached: {case: the case whose cache it starts with}; other cases start with an empty cache.
        command: of a section that another program measures.
    """

    title: str
    about: str
    columns: Mapping[str, tuple[str, str]]
    cases: Mapping[str, str] = field(default_factory=dict)
    measure: Callable[[SimpleNamespace], Row] | None = None
    prepare: Callable[[SimpleNamespace], None] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = ""
    speed: bool = True
    rounds: int = 1
    cached: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    def default_settings(self, *, quick: bool) -> Row:
        """Returns cases, rounds, options and axes."""
        settings = {"cases": list(self.cases), "rounds": self.rounds, **self.options, **self.axes}
        return settings | ({"rounds": 1} | dict(self.quick) if quick else {})


class CaseError(Exception):
    """A case that ended without a result; its text is the end of what the process wrote."""


def run_benchmark(name: str, benchmark: Benchmark, settings: Row, *, quick: bool = False) -> Row:
    """Measures all cases; returns the measurement, with `failed`: {case: reason}. Prints progress to stderr."""
    rows: dict[tuple[Any, ...], list[Row]] = {}
    failed: dict[str, str] = {}
    options = {key: settings[key] for key in benchmark.options}
    axes = {key: settings[key] for key in benchmark.axes}

    def try_child(title: str, request: Row) -> Row | None:
        print(f"{name}: {title} ...", file=sys.stderr, flush=True)
        try:
            return run_child(name, request, quick=quick)
        except CaseError as error:
            print(f"{name}: {title} failed: {error}", file=sys.stderr, flush=True)
            failed[title] = str(error)
            return None

    with tempfile.TemporaryDirectory(prefix=f"dpokit-{name}-") as folder:
        if benchmark.prepare is not None:
            try_child("preparation", {"case": None, "folder": folder, "output": folder, **options, **axes})
        turns = product(range(settings["rounds"]), product(*axes.values()), settings["cases"])
        for number, values, case in turns if not failed else ():
            title = ", ".join(map(str, (benchmark.cases[case], *values)))
            if title in failed:
                continue
            places = [
                f"{number}-{'-'.join(map(str, (place, *values)))}" for place in (case, benchmark.cached.get(case))
            ]
            output, cache = Path(folder, places[0]), Path(folder, places[case in benchmark.cached], "cache")
            axis = dict(zip(axes, values, strict=True))
            request = {"case": case, "folder": folder, "output": str(output), "cache": str(cache), **options, **axis}
            result = try_child(title, request)
            if case not in benchmark.cached.values():
                shutil.rmtree(output)
            if result is not None:
                rows.setdefault((case, *values), []).append({"case": benchmark.cases[case], **axis, **result})
    measured = [take_medians(rounds) for rounds in rows.values()]
    compare(benchmark, measured)
    return {
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "command": describe_command(name, benchmark, settings, quick=quick),
        "versions": {package: version(package) for package in PACKAGES},
        "rows": measured,
        "failed": failed,
    }


def run_child(name: str, request: Row, *, quick: bool) -> Row:
    """The result of one case, measured by a new process. Raises: CaseError."""
    output = Path(request["output"])
    output.mkdir(exist_ok=True)
    cache = request.pop("cache", str(output / "cache"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "DPOKIT_CACHE": cache, "HF_DATASETS_CACHE": f"{cache}/datasets"}
    environment |= {} if quick else KEEP_MEMORY
    command = [sys.executable, str(RUN), "--child", name, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    result = output / "result.json"
    if done.returncode or not result.exists():
        raise CaseError(done.stderr.strip()[-2000:] or f"exit code {done.returncode}")
    return json.loads(result.read_text())


def become_child(benchmark: Benchmark, request: str) -> None:
    """Measures one case in this process, or prepares all."""
    options = SimpleNamespace(**json.loads(request))
    options.folder, options.output = Path(options.folder), Path(options.output)
    work = benchmark.prepare if options.case is None else benchmark.measure
    assert work is not None
    (options.output / "result.json").write_text(json.dumps(work(options)))


def take_medians(rounds: list[Row]) -> Row:
    """One row of several: the median of each number, and the last of all other values."""
    return {
        key: statistics.median(row[key] for row in rounds) if type(value) in (int, float) and len(rounds) > 1 else value
        for key, value in rounds[-1].items()
    }


def compare(benchmark: Benchmark, rows: list[Row]) -> None:
    """Adds `relative` and `difference` to the rows: to the baseline with the same values of the axes."""
    for row in rows:
        title = benchmark.cases.get(benchmark.baseline)
        same = [base for base in rows if base["case"] == title and all(base[key] == row[key] for key in benchmark.axes)]
        for base in same:
            if row.get("seconds") and base.get("seconds"):
                ratio = base["seconds"] / row["seconds"]
                row["relative"] = ratio if benchmark.speed else 1 / ratio
            if row is not base and row.get("numbers") and base.get("numbers"):
                pairs = zip(row["numbers"], base["numbers"], strict=True)
                row["difference"] = max(abs(left - right) / max(1, abs(right)) for left, right in pairs)


def describe_machine() -> str:
    """Cores, processor and GPUs of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown processor")
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    return f"{len(os.sched_getaffinity(0))} CPU cores ({processor}), {', '.join(filter(None, gpus)) or 'no GPU'}"


def describe_command(name: str, benchmark: Benchmark, settings: Row, *, quick: bool) -> str:
    """The command that measures this again: with the flags that differ from the defaults."""
    command = ["python", str(RUN.relative_to(ROOT)), name, *(["--quick"] if quick else [])]
    for key, default in benchmark.default_settings(quick=quick).items():
        if settings[key] != default:
            values = settings[key] if isinstance(settings[key], list) else [settings[key]]
            command += [f"--{key}", *map(str, values)]
    return shlex.join(command)


def read_record(name: str) -> list[Row]:
    """The measurements of a benchmark; none if it was not measured."""
    path = RECORDS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def write_record(name: str, benchmark: Benchmark, measurement: Row) -> None:
    """Adds a measurement; rows that it measured again are removed from the others, with the findings about them."""

    def identify(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("case", *benchmark.axes))

    measured = {identify(row) for row in measurement["rows"]}
    kept = []
    for older in read_record(name):
        rows = [row for row in older["rows"] if identify(row) not in measured]
        if len(rows) < len(older["rows"]) and (lost := older.pop("findings", "")):
            print(f"{name}: removed, as it is about older numbers:\n{lost}", file=sys.stderr)
        kept += [older | {"rows": rows}] if rows else []
    kept.append({key: value for key, value in measurement.items() if key != "failed"})
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def build_table(benchmark: Benchmark, rows: Sequence[Row]) -> str:
    """The rows in Markdown; nothing without rows."""
    if not rows:
        return ""
    columns = {
        key: column for key, column in benchmark.columns.items() if any(row.get(key) is not None for row in rows)
    }
    lines = [[heading for heading, _ in columns.values()], ["---"] * len(columns)]
    lines += [[show(row.get(key), style) for key, (_, style) in columns.items()] for row in rows]
    return "\n".join("|" + "|".join(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)


def show(value: Any, style: str) -> str:
    """A cell: a number in the column's format (1e-5, not 1e-05), a text as it is, a model by its title."""
    if value is None or isinstance(value, str):
        return MODELS.get(value or "", value or "")
    return format(value, style).replace("e-0", "e-").replace("%", " %").removesuffix(".")


def build_section(benchmark: Benchmark, record: Iterable[Row]) -> str:
    """A section of the page: each measurement with its command, its table, its findings, its date and machine."""
    parts = [f"## {benchmark.title}", benchmark.about.strip()]
    for measurement in record:
        parts += [f"```bash\n{measurement['command']}\n```", build_table(benchmark, measurement["rows"])]
        parts += [f"{measurement['date']}, {measurement['machine']}.", measurement.get("findings", "")]
    return "\n\n".join(filter(None, parts)) + "\n"


def build_page(benchmarks: Mapping[str, Benchmark]) -> str:
    """docs/benchmarks.md from the records of all benchmarks."""
    records = {name: read_record(name) for name in benchmarks}
    machines = {measurement["machine"] for record in records.values() for measurement in record}
    only_cpus = all(machine.endswith("no GPU") for machine in machines)
    sections = [HEAD.format(hardware="All numbers are from CPUs. No GPU has run this version. " if only_cpus else "")]
    sections += [build_section(benchmarks[name], record) for name, record in records.items() if record]
    if waiting := [benchmarks[name] for name, record in records.items() if not record]:
        lines = [f"- {benchmark.title}: `{benchmark.command}`" for benchmark in waiting]
        sections.append("\n".join(["## Not measured yet\n", *lines, ""]))
    return "\n".join(sections)

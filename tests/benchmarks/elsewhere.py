"""Sections of docs/benchmarks.md that other programs measure; their records are written by hand."""

from benchmarks.benchmark import Benchmark

ELSEWHERE = {
    "faults": Benchmark(
        title="Killed runs",
        about="""
A tiny GPT-2 trains 60 steps with a checkpoint every 4. The script kills all its processes (kill -9) at random times and
deletes the cache of reference log-probs before half of the starts. It compares the run with an undisturbed one. It then
runs the tests of all other faults. `bash launch/test.sh --slow` includes a part of each kind.
""",
        columns={
            "case": ("placement", ""),
            "processes": ("processes", ""),
            "options": ("options", ""),
            "kills": ("kills", ""),
            "end": ("losses and weights", ""),
            "repeated": ("steps repeated", ""),
        },
    ),
    "plan": Benchmark(
        title="Memory predicted by the plan",
        about="The prediction for a CPU is the live tensors and the process before training.",
        columns={
            "case": ("case", ""),
            "predicted": ("predicted, GiB", ".2f"),
            "measured": ("measured, GiB", ".2f"),
            "difference": ("difference", ".0%"),
        },
    ),
    "report": Benchmark(
        title="Report",
        about="""
The command also opens reports in a real Chromium: Debian's, which it installs if it is missing and the user is root.
""",
        columns={"case": ("report", ""), "seconds": ("seconds", ".1f"), "megabytes": ("MB", ".1f")},
    ),
}

"""The table of docs/placements.md, from the results of test_placements.py in this test run."""

import os
from datetime import date
from importlib.metadata import version

PLACEMENTS = ("one device", "DDP", "ZeRO-2", "ZeRO-3", "ZeRO-3 + CPU offload", "FSDP2")
COLUMNS = [(device, kind) for device in ("CPU", "GPU") for kind in ("full", "LoRA", "QLoRA")]
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "bitsandbytes")


def write_placements(terminalreporter) -> None:
    """Writes the table to the terminal if any test recorded a `placement`: (device, placement, kind)."""
    results: dict[tuple[str, str, str], str] = {}
    for outcome, mark in (("passed", "yes"), ("failed", "FAILS")):
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", []):
                if name == "placement" and (report.when == "call" or outcome == "failed"):
                    results[tuple(value)] = mark
    if results:
        terminalreporter.section("placements, for docs/placements.md")
        terminalreporter.write_line(render(results))


def render(results: dict[tuple[str, str, str], str]) -> str:
    """A Markdown table with a row per placement and a column per device and kind; tests that did not run are marked."""
    lines = ["| placement | " + " | ".join(f"{device}, {kind}" for device, kind in COLUMNS) + " |"]
    lines.append("|---|" + "---|" * len(COLUMNS))
    for placement in PLACEMENTS:
        cells = [results.get((device, placement, kind), "not run") for device, kind in COLUMNS]
        lines.append(f"| {placement} | " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return "\n".join([*lines, "", f"{date.today()}, {machine()}; {versions}."])


def machine() -> str:
    import torch

    text = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        return f"{text}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{text}, no GPU"

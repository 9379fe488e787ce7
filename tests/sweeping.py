"""Runs `dpokit sweep` as a process, with a recipe that replaces training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from dpokit.rundir import RunDir, read_metrics

STAND_IN = Path(__file__).parent / "sweep" / "stand_in_recipe.py"


class Sweeping:
    """A search in its own folder.

    Args:
        folder: holds the space, the search and the list of all starts of runs.
        text: the space without its recipe.
        recipe: by default the recipe that replaces training.
        more: environment variables.
    """

    def __init__(self, folder: Path, text: str, *, recipe: Path = STAND_IN, **more: str) -> None:
        self.more = more
        self.space, self.folder, self.starts_file = folder / "space.yaml", folder / "sweep", folder / "starts.jsonl"
        self.space.write_text(f"recipe: {recipe}\n{text}")

    def command(self, *flags: str) -> list[str]:
        argv = [sys.executable, "-m", "dpokit.cli", "sweep", str(self.space), "--output-dir", str(self.folder)]
        return [*argv, "--json", *flags]

    def environment(self) -> dict[str, str]:
        return os.environ | {"STAND_IN_STARTS": str(self.starts_file)} | self.more

    def begin(self, *flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*flags),
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, *flags: str) -> dict:
        """Runs the search to its end; its JSON output."""
        done = subprocess.run(
            self.command(*flags), env=self.environment(), capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    def starts(self) -> list[dict]:
        """`{run, from}` of every start, oldest first."""
        return (
            [json.loads(line) for line in self.starts_file.read_text().splitlines()]
            if self.starts_file.exists()
            else []
        )

    def runs(self) -> list[RunDir]:
        """The runs in the order of their trials."""
        folders = [path for path in self.folder.glob("trial-*") if path.is_dir()]
        return [
            RunDir(path) for path in sorted(folders, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
        ]

    def check_whole(self, trials: int, *, steps: int = 8) -> None:
        """Asserts that every trial has finished with each of its steps once, and that none restarted after its end."""
        assert [run.path.name for run in self.runs()] == [f"trial-{number}" for number in range(trials)]
        for run in self.runs():
            assert run.read_run()["state"] == "finished"
            assert [record["step"] for record in read_metrics(run.metrics_jsonl)] == list(range(1, steps + 1))
            begun = [start["from"] for start in self.starts() if start["run"] == run.path.name]
            assert begun == sorted(begun)
            assert max(begun) < steps

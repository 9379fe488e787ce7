"""Converts ZeRO's shards for another number of processes, into DeepSpeed's universal checkpoint.

DeepSpeed's own command line does it, so that dpokit does not import DeepSpeed.
"""

import shutil
import subprocess
from pathlib import Path

from dpokit.console import say
from dpokit.errors import RunFolderError
from dpokit.interpreter import PYTHON


def convert_shards(checkpoint: Path) -> None:
    """Writes the universal checkpoint beside the shards.

    An old one is replaced, because no manifest tells whether it is whole.

    Raises: RunFolderError with the last line of DeepSpeed's output.
    """
    shards = checkpoint / (checkpoint / "latest").read_text().strip()
    universal = checkpoint / f"{shards.name}_universal"
    marker = checkpoint / "latest_universal"  # DeepSpeed writes it last
    marker.unlink(missing_ok=True)
    shutil.rmtree(universal, ignore_errors=True)
    say(f"converting {shards} for another number of processes")
    flags = ["--input_folder", str(shards), "--output_folder", str(universal), "--inject_missing_state"]
    command = [*PYTHON, "-m", "deepspeed.checkpoint.ds_to_universal", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not marker.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFolderError(
            f"{shards} cannot be converted for another number of processes: {last[:300]}",
            expected="a ZeRO checkpoint that DeepSpeed's ds_to_universal can read",
            do="resume with the number of processes that wrote it",
        )

"""ZeRO's shards for another number of processes: DeepSpeed's universal checkpoint, made when it is needed.

DeepSpeed is asked through its own command line, so that it is imported nowhere here.
"""

import shutil
import subprocess
from pathlib import Path

from dpokit.console import say
from dpokit.errors import RunFolderError
from dpokit.interpreter import PYTHON


def convert_shards(checkpoint: Path) -> None:
    """Writes the universal form beside the shards, always anew: no manifest tells whether an old one is whole.

    Raises: RunFolderError with what DeepSpeed said.
    """
    shards = checkpoint / (checkpoint / "latest").read_text().strip()
    universal = checkpoint / f"{shards.name}_universal"
    marker = checkpoint / "latest_universal"  # DeepSpeed's, written last
    marker.unlink(missing_ok=True)
    shutil.rmtree(universal, ignore_errors=True)
    say(f"converting {shards} for another number of processes")
    words = ["--input_folder", str(shards), "--output_folder", str(universal), "--inject_missing_state"]
    command = [*PYTHON, "-m", "deepspeed.checkpoint.ds_to_universal", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not marker.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFolderError(
            f"{shards} cannot be converted for another number of processes: {last[:300]}",
            expected="a ZeRO checkpoint that DeepSpeed's ds_to_universal takes",
            do="resume with the number of processes it was written by",
        )

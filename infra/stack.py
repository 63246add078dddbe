"""An object store, an MLflow server and a Ray of two nodes on this machine, until Ctrl-C (`make stack`).

    python -m infra.stack --data stack-data

Everything listens on free ports of 127.0.0.1 and is ended with this process. What a shell needs to use it is
printed, and written to `<data>/environment.sh` (readable by its owner only: it holds the keys of this stack).
"""

import argparse
import shlex
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from infra.processes import StartFailed
from infra.services import RAY_ENVIRONMENT, RayNode, mlflow_server, object_store, ray_cluster

PARTS = ("store", "mlflow", "ray")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infra.stack", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("stack-data"), help="where everything is kept")
    parser.add_argument("--bucket", default="namr", help="the bucket that is made in the object store")
    parser.add_argument("--without", choices=PARTS, nargs="*", default=[], help="parts to leave out")
    parser.add_argument(
        "--cpus", type=float, nargs="+", default=[1, 1], help="CPUs of each node of Ray; one node per number"
    )
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of the first node of Ray")
    return parser.parse_args(argv)


def write_exports(path: Path, variables: dict[str, str]) -> str:
    """Write `export NAME=value` lines that only the owner can read; the same as text."""
    text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
    return text


def run(options: argparse.Namespace) -> None:
    """Start the parts in order, print how to reach them, wait for an interrupt, end them in reverse."""
    data = options.data.absolute()
    data.mkdir(parents=True, exist_ok=True)
    variables: dict[str, str] = {}
    lines: list[str] = []
    with ExitStack() as exits:
        store = None
        if "store" not in options.without:
            print("starting the object store ...", flush=True)
            store = exits.enter_context(object_store(data / "store"))
            lines.append(f"object store   {store.endpoint}   bucket {store.create_bucket(options.bucket)}")
            variables |= store.environment
        if "mlflow" not in options.without:
            print("starting the MLflow server ...", flush=True)
            server = exits.enter_context(mlflow_server(data / "mlflow", store))
            lines.append(f"MLflow         {server.tracking_uri}")
            variables["MLFLOW_TRACKING_URI"] = server.tracking_uri
        if "ray" not in options.without:
            print(f"starting Ray with {len(options.cpus)} nodes ...", flush=True)
            nodes = [
                RayNode(num_cpus=cpus, num_gpus=0 if number else options.gpus)
                for number, cpus in enumerate(options.cpus)
            ]
            ray = exits.enter_context(ray_cluster(data / "ray", nodes=nodes, environment=dict(variables)))
            lines.append(f"Ray            {ray.dashboard_url}   (dashboard and jobs)")
            variables |= {
                "RAY_API_SERVER_ADDRESS": ray.dashboard_url,  # read by `ray job submit`
                "RAY_ADDRESS": ray.address,  # read by jobs that are started directly
                "RAY_AUTH_MODE": RAY_ENVIRONMENT["RAY_AUTH_MODE"],
            }
        exports_path = data / "environment.sh"
        exports = write_exports(exports_path, variables)
        print("", *lines, "", f"In another shell (or: . {exports_path}):", "", exports, sep="\n")
        print("Ctrl-C ends it all.", flush=True)
        signal.pause()


def interrupt_once(_number: int, _frame: FrameType | None) -> None:
    """Unwind from wherever the start is; a second signal must not leave programs behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ending ...", flush=True)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    signal.signal(signal.SIGINT, interrupt_once)
    signal.signal(signal.SIGTERM, interrupt_once)
    try:
        run(options)
    except KeyboardInterrupt:
        return
    except StartFailed as failure:
        sys.exit(str(failure))


if __name__ == "__main__":
    main()

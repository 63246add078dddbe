"""How busy a machine is, under the names by which MLflow shows it: processors, memory, disk, network, GPUs.

Measured by MLflow's own monitors. They need psutil, which Ray brings along and has on its path wherever it is
imported; GPUs are among them where pynvml (nvidia-ml-py) is installed.

Not covered: when to measure, and sending it (`train.machines`).
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from namr.errors import ConfigError

Sample = Callable[[], dict[str, float]]


def monitors(node: str) -> Sample:
    """What measures this machine now, by names of MLflow's with `node` in them.

    Network is counted since this was made. ConfigError without psutil.
    """
    try:
        from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor
    except ImportError as error:
        raise ConfigError(f"{error}: system metrics need it; leave out workers.system_metrics_s") from error
    kinds: Any = (cpu_monitor.CPUMonitor, disk_monitor.DiskMonitor, network_monitor.NetworkMonitor)
    made = [kind() for kind in kinds]
    with suppress(ImportError, RuntimeError):  # no pynvml, or no GPU
        kind: Any = gpu_monitor.GPUMonitor
        made.append(kind())

    def sample() -> dict[str, float]:
        named: dict[str, float] = {}
        for monitor in made:
            monitor.collect_metrics()
            measured = monitor.aggregate_metrics().items()
            named |= {f"system/{node}/{name}": float(value) for name, value in measured}
            monitor.clear_metrics()
        return named

    return sample

"""How busy a machine is, by the names that MLflow shows under "system"."""

import ray  # noqa: F401  brings psutil along, as it does in the processes that train

from namr.registry import system_metrics


def test_a_machine_is_measured_under_its_name() -> None:
    sample = system_metrics.monitors("host-1")
    sample()
    measured = sample()
    assert 0 <= measured["system/host-1/cpu_utilization_percentage"] <= 100
    assert 0 < measured["system/host-1/system_memory_usage_percentage"] <= 100
    assert measured["system/host-1/network_receive_megabytes"] >= 0
    assert all(name.startswith("system/host-1/") for name in measured)

"""Training under every fault of the table, on three nodes with a network between them."""

from pathlib import Path

import pytest

from infra import network
from tests.soak import faults


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_training_outlives_what_its_nodes_network_and_stores_suffer(tmp_path: Path) -> None:
    try:
        rows = faults.run([*faults.FAULTS], steps=10_000, shards=True, folder=tmp_path)
    except network.Unavailable as reason:
        pytest.skip(str(reason))
    print(faults.table(rows))
    back = sum(fault.restore is not None for fault in faults.FAULTS.values())
    assert len(rows) == len(faults.FAULTS) + back + 2

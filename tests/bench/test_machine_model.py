"""The machine model's calibration at its smallest size: rates of this machine, and what they predict."""

import json

from machine_model.calibration import calibrate


def test_calibration(tmp_path):
    """The one part of the model that is checked against drives that are there."""
    found = calibrate(tmp_path, contexts=(1024, 4096), rounds=1, probe_tokens=1024)
    assert [one.num_drives for one in found.rates] == [1, 2]
    assert all(one.disk > 1e6 and one.kernels > 1e6 for one in found.rates)
    cases = {(one.source, one.num_drives, one.context) for one in found.comparisons}
    assert cases == {(s, n, c) for s in ("flash", "cache") for n in (1, 2) for c in (1024, 4096)}
    assert all(one.predicted > 0 and one.measured > 0 for one in found.comparisons)
    rows = json.loads(json.dumps(found.as_dict()))["comparisons"]
    assert all(row["error"] == row["predicted"] / row["measured"] - 1 for row in rows)

"""Settings of the whole suite: two processes of it share two cores, and every run checks the same."""

import os

import hypothesis

# Before torch is imported. Its threads spin while they wait for each other: beside another process on the same
# cores, one that waits takes the time of the one it waits for. Models of tests are too small to gain by two.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# "fixed": the same examples each time, so that a failure comes from a change; "search": others each time
# (`make search`). No deadlines: how long an example takes says how busy the machine is.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")

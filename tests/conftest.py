"""What every test shares: one thread, no progress bars."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["GUIDED_DESCENT_PROGRESS"] = "0"

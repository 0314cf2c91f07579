"""For all tests: one thread for each process, and no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which is not yet
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

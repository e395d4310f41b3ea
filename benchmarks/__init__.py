"""Time and memory of flexkd relative to other implementations, both sides measured in turn; run by `make bench`."""

import os

from flexkd.allocator import keep_pages

# Read when torch is loaded. On shared cores busy waiting makes two threads ten times slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

# For both sides of every row, as the `flexkd` command does for its own process.
keep_pages()

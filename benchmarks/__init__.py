"""What flexkd costs against its rivals: ratios, both sides measured in turn. Run by `make bench`, not by the tests."""

import os

from flexkd.allocator import keep_pages

# Read when torch is loaded: with shared cores a busy wait makes two threads ten times slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

# Both sides of every row, as the `flexkd` command does it for itself.
keep_pages()

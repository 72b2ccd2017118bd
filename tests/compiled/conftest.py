"""The tests of this folder need ttsem, which .ci/compiled installs; no other run selects them."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("ttsem") else ["test_*.py"]

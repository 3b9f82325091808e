"""Numbers of examples: few by default, 10,000 of each with `--hypothesis-profile=long`.

The default examples are always the same.
"""

from __future__ import annotations

import pytest

hypothesis = pytest.importorskip("hypothesis")

common = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile(
    "some", max_examples=50, derandomize=True, database=None, **common
)
hypothesis.settings.register_profile("long", max_examples=10_000, print_blob=True, **common)
hypothesis.settings.load_profile("some")

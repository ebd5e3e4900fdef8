"""What tests share."""

import pytest

# So that a failed assertion there shows its values, as one in a test does.
pytest.register_assert_rewrite("tests.helpers.runs", "tests.helpers.tracked_runs")

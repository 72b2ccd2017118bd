"""The data that the tests of training share."""

from __future__ import annotations

import pytest

from gpt.data.dataset import TokenData
from tests.gpt.text import TEXT


@pytest.fixture
def data() -> TokenData:
    return TokenData.from_text(TEXT)

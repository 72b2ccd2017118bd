"""The data that the tests of training share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpt.text import TEXT

if TYPE_CHECKING:
    from gpt import TokenData


@pytest.fixture
def data() -> TokenData:
    from gpt import TokenData  # not at the top: tests/conftest.py chooses the interpreter after this import

    return TokenData.from_text(TEXT)

"""Rows with instructions: which pieces are trained on, the template of a conversation, and damaged rows."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gpt import InputError
from gpt.data.documents import Piece
from gpt.data.instructions import conversation, instruction

USER, ASSISTANT = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_completion_is_trained_on_and_its_prompt_is_not() -> None:
    """A prompt among the targets, or text that is not in the row."""
    row = {"id": 3, "prompt": "2+2=", "completion": "4"}
    assert instruction("data: a.jsonl:1", row) == [
        Piece("2+2=", trained=False),
        Piece("4<|endoftext|>", trained=True),
    ]
    assert instruction("data: a.jsonl:1", {"text": "2+2=4"}) is None


def test_the_answers_of_a_conversation_and_what_ends_them_are_trained_on() -> None:
    """A user's turn among the targets, or an answer whose end is not learnt."""
    row = {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}
    assert instruction("data: a.jsonl:1", row) == [
        Piece("### System:\nBe brief.\n\n### User:\nHi.\n\n### Assistant:\n", trained=False),
        Piece("Hello!\n\n### User:\n", trained=True),
        Piece("Hi.\n\n### Assistant:\n", trained=False),
        Piece("Hello!<|endoftext|>", trained=True),
    ]


def test_an_open_conversation_begins_as_the_one_that_was_trained_on() -> None:
    """Another template while sampling than in training."""
    trained = instruction("data: a.jsonl:1", {"messages": [USER, ASSISTANT, USER, ASSISTANT]})
    assert trained is not None
    assert conversation("", [("Hi.", "Hello!"), ("Hi.", None)]) == trained[:-1]


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "prompt": ({"prompt": 3, "completion": "4"}, "prompt is 3, expected a text"),
    "completion": ({"prompt": "3", "completion": None}, "completion is None, expected a text"),
    "list": ({"messages": "Hi."}, "messages is 'Hi.', expected a list of messages"),
    "empty": ({"messages": []}, r"messages is \[\], expected a list of messages"),
    "message": ({"messages": ["Hi."]}, r"messages\[0\] is 'Hi.', expected an object"),
    "role": ({"messages": [USER, USER]}, r"messages\[1\] has the role 'user', expected 'assistant'"),
    "no role": ({"messages": [{}]}, r"messages\[0\] has the role None, expected 'user'"),
    "late system": (
        {"messages": [USER, SYSTEM]},
        r"messages\[1\] has the role 'system', expected 'assistant'",
    ),
    "content": ({"messages": [{"role": "user"}]}, r"messages\[0\]: content is None, expected a text"),
    "open": (
        {"messages": [USER, ASSISTANT, USER]},
        "messages ends with the role 'user', expected 'assistant'",
    ),
    "system": ({"messages": [SYSTEM]}, "messages ends with the role 'system', expected 'assistant'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_row_is_refused(case: str) -> None:
    """A traceback, or a message that does not lead to the row and the field."""
    row, message = DAMAGED[case]
    with pytest.raises(InputError) as raised:
        instruction("data: a.jsonl:7", row)
    assert re.match(f"data: a.jsonl:7: {message}", str(raised.value))
    assert "\n" not in str(raised.value)

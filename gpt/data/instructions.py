"""Instructions and conversations: the pieces of a row, of which only the answers are trained on.

A conversation becomes plain text, which needs no tokens of its own. The answers are trained on, and what ends
them: <|endoftext|> after the last, the user's marker after the others.

    ### System:
    Answer in one word.

    ### User:
    What is the capital of France?

    ### Assistant:
    Paris

    ### User:
    And of Spain?

    ### Assistant:
    Madrid<|endoftext|>
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from gpt.data.documents import Piece
from gpt.data.tokenizers import END_OF_TEXT
from gpt.errors import InputError, shown

FIELDS = ("prompt", "completion", "messages")  # of a row
SYSTEM, USER, ASSISTANT = "### System:\n", "### User:\n", "### Assistant:\n"
GAP = "\n\n"
NEXT_TURN = GAP + USER  # ends an answer that is not the last


def conversation(system: str, exchanges: Sequence[tuple[str, str | None]]) -> list[Piece]:
    """The pieces of a conversation, each to be tokenized alone.

    Args:
        system: What precedes the conversation; "" for nothing.
        exchanges: What the user says and what the assistant answers, None where that is to be generated.
    """
    pieces: list[Piece] = []
    begin = (SYSTEM + system + GAP if system else "") + USER
    for number, (question, answer) in enumerate(exchanges, start=1):
        pieces.append(Piece(begin + question + GAP + ASSISTANT, trained=False))
        if answer is not None:
            pieces.append(Piece(answer + (END_OF_TEXT if number == len(exchanges) else NEXT_TURN)))
        begin = ""  # the answer before ends with the user's marker
    return pieces


def instruction(where: str, row: Mapping[str, Any]) -> list[Piece] | None:
    """The pieces of a row with `prompt` and `completion`, or with `messages`; None of any other row.

    Args:
        where: Begins an error: "data: FILE:LINE".
        row: The fields. "prompt" and "completion" are texts. "messages" are objects with a "role" and a
            "content": at first "system", which may be missing, then "user" and "assistant" in turn.

    Raises:
        InputError: A field has another type, or a role is another one.
    """
    if "prompt" in row and "completion" in row:
        prompt, completion = (_text(f"{where}: {name}", row[name]) for name in ("prompt", "completion"))
        return [Piece(prompt, trained=False), Piece(completion + END_OF_TEXT)]
    if "messages" in row:
        return _conversation(f"{where}: messages", row["messages"])
    return None


def _conversation(where: str, messages: Any) -> list[Piece]:
    """The pieces of the conversation in a field `messages`."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where} is {shown(messages)}, expected a list of messages")
    has_system = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    roles = itertools.chain(["system"] * has_system, itertools.cycle(["user", "assistant"]))
    texts = [
        _content(f"{where}[{number}]", message, role)
        for number, (message, role) in enumerate(zip(messages, roles, strict=False))
    ]

    system = texts.pop(0) if has_system else ""
    if not texts or len(texts) % 2:
        raise InputError(f"{where} ends with the role {messages[-1]['role']!r}, expected 'assistant'")
    return conversation(system, list(zip(texts[::2], texts[1::2], strict=True)))


def _content(where: str, message: Any, role: str) -> str:
    """The text of a message, which has to be of `role`."""
    if not isinstance(message, dict):
        raise InputError(f'{where} is {shown(message)}, expected an object with "role" and "content"')
    if message.get("role") != role:
        raise InputError(f"{where} has the role {shown(message.get('role'))}, expected {role!r}")
    return _text(f"{where}: content", message.get("content"))


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} is {shown(value)}, expected a text")
    return value

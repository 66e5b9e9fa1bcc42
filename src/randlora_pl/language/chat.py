"""Conversations of JSON lines: objects with ``messages``, of the system if at all, then of user and assistant in turns.

Every error has file, line and message. Imports no PyTorch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from randlora_pl.language.text_files import HALF, half_character, own_files, read_values
from randlora_pl.utils.errors import UserError, brief, near
from randlora_pl.utils.files import open_plain

ROLES = ("system", "user", "assistant")
MESSAGES = '{"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]}'
EXPECTED = f"a line such as {MESSAGES} per conversation"
MEANT = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
"""Roles of other programs, and ours."""
UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight")
"""Fields of other programs' messages that change what is learned."""


class Turn(NamedTuple):
    """A message: its role, one of `ROLES`, and its text."""

    role: str
    content: str


Turns = tuple[Turn, ...]
Chat = Sequence[Turn | Mapping[str, str]]
"""Messages as a user gives them."""


@dataclass(frozen=True)
class Conversation:
    """The checked turns of a conversation, and its location in a file."""

    turns: Turns
    where: str = field(repr=False, compare=False)

    @property
    def asked(self) -> Turns:
        """The turns up to the last one of the user, without an answer after it."""
        return self.turns[:-1] if self.turns[-1].role == "assistant" else self.turns


def turns_of(messages: object, where: str) -> Turns:
    """Return the turns of a list of messages, as JSON has them.

    Args:
        messages: Objects with ``role`` and ``content``. The system comes first if at all, then user and assistant take
            turns; either may be the last.
        where: Location for errors.

    Raises:
        UserError: A message is wrong; the error has its number from 1.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"{where}: 'messages' must be a list of messages. Expected: {MESSAGES}")
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        given = message._asdict() if isinstance(message, Turn) else message
        if fault := _fault(given, turns):
            raise UserError(f"{where}, message {number}: {fault}")
        turns.append(Turn(given["role"], given["content"]))
    if turns[-1].role == "system":
        raise UserError(f"{where}: there is only a system message. Add the user's.")
    return tuple(turns)


def _fault(message: Any, before: Sequence[Turn]) -> str:
    if not isinstance(message, dict):
        return "expected an object with role and content."
    if absent := [name for name in ("role", "content") if name not in message]:
        given = ", ".join(brief(name, 20) for name in [*message][:4]) or "nothing"
        return f"{absent[0]!r} is missing, there is {given}. Expected: {MESSAGES}"
    role, content = message["role"], message["content"]
    if role in ("tool", "function"):
        return f"the role {role!r} is not supported. Remove the calls of tools, or write them as text."
    if role not in ROLES:
        meant = near(MEANT.get(str(role), str(role)), ROLES)
        return f"the role {json.dumps(role)[:40]} is unknown.{meant} There are {', '.join(ROLES)}"
    if unread := [name for name in UNREAD if message.get(name) not in (None, "", [])]:
        return f"{unread[0]!r} is not read, only role and content are. Remove it, or write it into the content."
    if not isinstance(content, str):
        return f"'content' must be text, not {json.dumps(content)[:40]}. Write it as one text."
    if not content.strip():
        return f"the text of the {role} is empty. Fill it, or delete the conversation."
    if half_character(content):
        return f"'content' {HALF}. Correct it."
    last = before[-1].role if before else "start"
    allowed = {"start": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[last]
    if role in allowed:
        return ""
    after = "a conversation begins with" if last == "start" else f"after the {last} comes"
    return f"{after} the {' or the '.join(allowed)}, not the {role}. Join the texts of one role, or correct the order."


def read_file(file: Path) -> list[Conversation]:
    """Return the conversations of a file in its order.

    Raises:
        UserError: A conversation is wrong; the message has file and line.
    """
    chats = []
    for line, value in read_values(file):
        where = f"{file}, line {line}"
        if not isinstance(value, dict) or "messages" not in value:
            advice = f"Expected: {MESSAGES}"
            if isinstance(value, dict) and "prompt" in value:
                advice = "For prompts and completions: --data.dataset jsonl"
            raise UserError(f"{where}: the record lacks 'messages'. {advice}")
        chats.append(Conversation(turns_of(value["messages"], where), where))
    return chats


def read_conversations(root: Path, split: str) -> list[Conversation]:
    """Return the conversations of a split, each ending with an answer; none if the split has no file.

    Raises:
        UserError: There is nothing to train on, or a conversation is wrong; the message has file and line.
    """
    file = own_files(root, ".jsonl", EXPECTED).get(split)
    if file is None:
        return []
    chats = read_file(file)
    for chat in chats:
        if chat.asked == chat.turns:
            raise UserError(f"{chat.where}: the last message is the user's, so no answer is learned. Add one.")
    if not chats:
        raise UserError(f"{file} has no conversations. Expected: {EXPECTED}")
    return chats


def has_conversations(file: Path) -> bool:
    """Return True if the first record of a JSON file has ``messages``; False also if it cannot be read."""
    try:
        with open_plain(file) as lines:
            first = next(line for line in lines if line.strip()).decode("utf-8-sig")
        record = read_values(file)[0][1] if first.lstrip().startswith("[") else json.loads(first)
    except (UserError, OSError, ValueError, RecursionError, StopIteration, IndexError):
        return False
    return isinstance(record, dict) and "messages" in record

"""Bytes of the messages between replicas. Pure.

A message is one frame, which begins with one byte that says what it is; but an image is a head that
says how many items there are, and slices of them, each encoded when it is its turn and decoded when
it comes, so that nobody is busy with all of a large one at once. Numbers are little-endian; a text
or value is its length and its bytes. Whatever comes is checked: bytes that are no message raise
ValueError and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from paddle_ft.serve.broadcast import Answer, Append, Install
from paddle_ft.serve.log import Entry, Held, Image, Kind, Position, size_of

Message = Append | Install | Answer

SLICE_BYTES = 2**18
"""Of the items in one slice without its last one, which may be as large as values are."""
SLICE_ITEMS = 1000
"""In one slice: what takes a few milliseconds to read."""
MESSAGE_BYTES_MAX = 2**30
"""Of an image: who sends more is not believed."""

KINDS: tuple[Kind, ...] = get_args(Kind)
_APPEND, _INSTALL, _ANSWER, _ITEMS = range(4)
_NONE = 0xFFFFFFFF
_POSITION = struct.Struct("<QQ")
_APPEND_HEAD = struct.Struct("<QQQQdI")
_ENTRY_HEAD = struct.Struct("<QQB")
_ITEM_HEAD = struct.Struct("<QB")
_INSTALL_HEAD = struct.Struct("<QQQdII")
_ANSWER_HEAD = struct.Struct("<Q?Qd")
_LENGTH = struct.Struct("<I")
_UNTIL = struct.Struct("<d")


def frames(message: Message) -> Iterator[bytes]:
    """The frames of one message, in order; those of an image are made one by one."""
    if not isinstance(message, Install):
        yield encode(message)
        return
    at, items, terms = message.image.at, message.image.items, message.image.terms
    head = _INSTALL_HEAD.pack(
        message.term, at.term, at.sequence, message.sent_s, len(terms), len(items)
    )
    firsts = [encode_position(first) for first in terms]
    yield b"".join([bytes((_INSTALL,)), head, _text(message.sender), *firsts])
    parts, size_bytes = [bytes((_ITEMS,))], 0
    for number, ((kind, key), held) in enumerate(items.items(), 1):
        item = [_ITEM_HEAD.pack(held.sequence, KINDS.index(kind)), _text(key)]
        item += [_LENGTH.pack(len(held.value)), held.value]
        parts += item
        size_bytes += sum(map(len, item))
        if size_bytes >= SLICE_BYTES or number % SLICE_ITEMS == 0:
            yield b"".join(parts)
            parts, size_bytes = [bytes((_ITEMS,))], 0
    if size_bytes:
        yield b"".join(parts)


@dataclass
class _Coming:
    """An image, of which more is to come."""

    head: Install
    items: dict[tuple[Kind, str], Held]
    count: int
    size_bytes: int = 0
    items_bytes: int = 0
    """As ``size_of`` counts."""


class Joiner:
    """Puts the frames of one stream together; holds at most MESSAGE_BYTES_MAX."""

    def __init__(self, bytes_max: int = MESSAGE_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._coming: _Coming | None = None

    def take(self, frame: bytes) -> Message | None:
        """The message that ``frame`` ends; None if more is to come. Raises ValueError."""
        coming, is_part = self._coming, frame[:1] == bytes((_ITEMS,))
        if is_part != (coming is not None):
            raise ValueError("a message begins within another one, or nowhere")
        if coming is None:
            if frame[:1] != bytes((_INSTALL,)):
                return decode(frame)
            coming = self._coming = _install(frame)
        else:
            coming.size_bytes += len(frame)
            if coming.size_bytes > self._bytes_max:
                raise ValueError(f"a message of more than {self._bytes_max} bytes")
            reader = _Reader(frame[1:])
            while not reader.ended:
                name, held = reader.item()
                coming.items[name] = held
                coming.items_bytes += size_of(name[1], held.value)
                if len(coming.items) > coming.count:
                    raise ValueError("an image has more items than it said")
        if len(coming.items) < coming.count:
            return None
        self._coming = None
        image = replace(coming.head.image, items=coming.items, size_bytes=coming.items_bytes)
        return replace(coming.head, image=image)


def _install(frame: bytes) -> _Coming:
    reader = _Reader(frame[1:])
    term, at_term, sequence, sent_s, terms, count = reader.numbers(_INSTALL_HEAD)
    sender = reader.text()
    firsts = tuple(Position(*reader.numbers(_POSITION)) for _ in range(terms))
    reader.end()
    if list(firsts) != sorted(firsts, key=lambda first: first.sequence):
        raise ValueError("the terms of an image are not in order")
    image = Image(Position(at_term, sequence), {}, firsts)
    return _Coming(Install(term, sender, image, sent_s), {}, count)


def encode(message: Append | Answer) -> bytes:
    parts: list[bytes]
    if isinstance(message, Append):
        head = _APPEND_HEAD.pack(
            message.term,
            message.before.term,
            message.before.sequence,
            message.acknowledged,
            message.sent_s,
            len(message.entries),
        )
        parts = [bytes((_APPEND,)), head, _text(message.sender)]
        for entry in message.entries:
            parts += _entry(entry)
    else:
        head = _ANSWER_HEAD.pack(message.term, message.agrees, message.sequence, message.sent_s)
        parts = [bytes((_ANSWER,)), head, _text(message.sender)]
    return b"".join(parts)


def decode(data: bytes) -> Append | Answer:
    """The message that ``encode`` made; raises ValueError if ``data`` is not one."""
    reader = _Reader(data)
    kind = reader.byte()
    message: Append | Answer
    if kind == _APPEND:
        term, before_term, before, acknowledged, sent_s, count = reader.numbers(_APPEND_HEAD)
        sender = reader.text()
        entries = tuple(reader.entry() for _ in range(count))
        at = Position(before_term, before)
        message = Append(term, sender, at, entries, acknowledged, sent_s)
        for number, entry in enumerate(entries, before + 1):
            if entry.at.sequence != number:
                raise ValueError(f"entry {entry.at.sequence} stands in the place of {number}")
    elif kind == _ANSWER:
        term, agrees, sequence, sent_s = reader.numbers(_ANSWER_HEAD)
        message = Answer(term, reader.text(), agrees, sequence, sent_s)
    else:
        raise ValueError(f"there is no message of kind {kind}")
    reader.end()
    return message


def encode_put(
    kind: Kind, key: str, value: bytes | None, term: int = 0, until_s: float = 0.0
) -> bytes:
    """A change that is passed on to the primary of ``term``, to be made in that term and before
    ``until_s`` by its clock."""
    entry = Entry(Position(term, 0), kind, key, value)
    return b"".join((_UNTIL.pack(until_s), *_entry(entry)))


def decode_put(data: bytes) -> tuple[Kind, str, bytes | None, int, float]:
    """Raises ValueError if ``data`` is not what ``encode_put`` made."""
    reader = _Reader(data)
    (until_s,) = reader.numbers(_UNTIL)
    entry = reader.entry()
    reader.end()
    return entry.kind, entry.key, entry.value, entry.at.term, until_s


def encode_position(position: Position) -> bytes:
    return _POSITION.pack(position.term, position.sequence)


def decode_position(data: bytes) -> Position:
    """Raises ValueError if ``data`` is not what ``encode_position`` made."""
    reader = _Reader(data)
    term, sequence = reader.numbers(_POSITION)
    reader.end()
    return Position(term, sequence)


def _text(text: str) -> bytes:
    data = text.encode()
    return _LENGTH.pack(len(data)) + data


def _entry(entry: Entry) -> list[bytes]:
    head = _ENTRY_HEAD.pack(entry.at.term, entry.at.sequence, KINDS.index(entry.kind))
    if entry.value is None:
        return [head, _text(entry.key), _LENGTH.pack(_NONE)]
    return [head, _text(entry.key), _LENGTH.pack(len(entry.value)), entry.value]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise ValueError("a message ends too early")
        return self._data[start : self._at]

    def numbers(self, form: struct.Struct) -> tuple[Any, ...]:
        try:
            return form.unpack(self.take(form.size))
        except struct.error as error:
            raise ValueError(str(error)) from None

    def byte(self) -> int:
        return self.take(1)[0]

    def text(self) -> str:
        (length,) = self.numbers(_LENGTH)
        return self.take(length).decode()  # UnicodeDecodeError is a ValueError

    def value(self) -> bytes | None:
        (length,) = self.numbers(_LENGTH)
        return None if length == _NONE else self.take(length)

    def kind(self, number: int) -> Kind:
        if number >= len(KINDS):
            raise ValueError(f"there is no kind {number} of entries")
        return KINDS[number]

    def entry(self) -> Entry:
        term, sequence, kind = self.numbers(_ENTRY_HEAD)
        key = self.text()
        entry = Entry(Position(term, sequence), self.kind(kind), key, self.value())
        entry.parts()  # raises ValueError
        return entry

    def item(self) -> tuple[tuple[Kind, str], Held]:
        sequence, kind = self.numbers(_ITEM_HEAD)
        key, value = self.text(), self.value()
        if value is None:
            raise ValueError(f"{key} has no value")
        return (self.kind(kind), key), Held(value, sequence)

    @property
    def ended(self) -> bool:
        return self._at == len(self._data)

    def end(self) -> None:
        if not self.ended:
            raise ValueError("a message goes on after its end")

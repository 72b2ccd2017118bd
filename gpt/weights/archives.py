"""Checks a `torch.save` file before torch reads it: its size, and what its pickle would make Python do.

torch's weights_only=True alone is not enough: it admits `bytearray(n)`, which allocates n bytes, and tuples
that contain each other, whose hash takes for ever or overflows the stack.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

from gpt.errors import InputError, first_line

TORCH_TYPES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch\.storage UntypedStorage"
    r"|torch (Size|device|[A-Za-z0-9]+Storage|b?float(16|32|64)?|u?int(8|16|32|64)|bool|half|double|long)"
)
FORBIDDEN = ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
GROWING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # change their first operand

# A GPT-2 XL with the state of AdamW takes 71,000 operations.
MOST_BYTES, MOST_OPERATIONS, MOST_LEVELS, MOST_WORK = 1 << 24, 200_000, 50, 10_000_000
LARGEST_INTEGER = 1 << 64


class _Shape(NamedTuple):
    """An object that a pickle builds: how deeply it is nested, and its size if nothing in it were shared."""

    levels: int
    size: int


def check_archive(path: Path, size: int) -> None:
    """Refuses an archive that unpacks to more than its size, or whose pickle needs more than tensors.

    Raises:
        InputError: The file is damaged, or is one of these.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if (
                any(e.compress_type != zipfile.ZIP_STORED for e in entries)
                or sum(e.file_size for e in entries) > size
            ):
                raise InputError(
                    f"from_pretrained: {path} is compressed or claims more than its {size:,} bytes, "
                    "expected a torch.save file"
                )
            pickles = [e for e in entries if e.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise InputError(
                    f"from_pretrained: {path} is a zip of {len(entries)} files, expected a torch.save file"
                )
            if pickles[0].file_size > MOST_BYTES:
                raise InputError(
                    f"from_pretrained: {path} has a pickle of {pickles[0].file_size:,} bytes, expected at "
                    f"most {MOST_BYTES:,}"
                )
            objection = _objection(archive.read(pickles[0]))
    except InputError:
        raise
    except Exception as error:  # a damaged zip or pickle can raise anything
        raise InputError(f"from_pretrained: {path} is damaged ({first_line(error)})") from error
    if objection is not None:
        raise InputError(
            f"from_pretrained: {path} needs {objection}, expected tensors alone, as "
            "torch.save(model.state_dict(), FILE) writes them"
        )


def _objection(content: bytes) -> str | None:
    """What a pickle needs that tensors do not: a name, an opcode, or too much time or stack."""
    stack: list[_Shape | None] = []  # None is a mark
    memo: dict[object, _Shape | None] = {}
    work = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
        name = opcode.name
        if name in FORBIDDEN:
            return f"{name}, which may run code"
        if name == "GLOBAL" and not TORCH_TYPES.fullmatch(str(argument)):
            return f"{str(argument).replace(' ', '.')!a}, which may run code".replace("'", "")
        if isinstance(argument, int) and abs(argument) >= LARGEST_INTEGER:
            return "an integer of more than 64 bits"
        if number >= MOST_OPERATIONS:
            return f"more than {MOST_OPERATIONS:,} operations"

        if "PUT" in name:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(None)
        else:
            operands = _operands(opcode, stack)
            container = operands.pop(0) if name in GROWING else _Shape(0, 0)
            levels = max([container.levels, *(1 + operand.levels for operand in operands)])
            size = 1 + sum(operand.size for operand in operands)
            work += size
            if levels > MOST_LEVELS or work > MOST_WORK:
                return "containers that are nested too deeply"
            stack += [_Shape(levels, container.size + size)] * len(opcode.stack_after)
    return None


def _operands(opcode: pickletools.OpcodeInfo, stack: list[_Shape | None]) -> list[_Shape]:
    """Removes the operands of an opcode from the stack; IndexError if they are not there."""
    count = len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        mark = len(stack) - 1
        while stack[mark] is not None:
            mark -= 1
        count = len(stack) - mark + opcode.stack_before.index(pickletools.markobject)
    if count > len(stack):
        raise IndexError("the pickle takes an object from an empty stack")
    operands = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return [operand for operand in operands if operand is not None]

"""Generators of hostile input: text, JSON, TOML, command lines, safetensors and pickles."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

ALPHABETS: tuple[Sequence[str], ...] = (
    "abcdefghijklmnop qrstuvwxyz",
    "aA1 \n\t'\".,;<|>{}[]",
    [chr(i) for i in range(32)] + ["\x7f", "\x85", "\u2028", "\u2029", "\ufeff"],
    ["\ud800", "\udbff", "\udc00", "\udfff", "a", " "],
    ["\u0301", "e", "\u200d", "\u202e", "\u05d0", "\u0627", "\u3042", "\U0001f600", "\U0010ffff", "\ufffe"],
    [" ", "\u00a0", "\u2003", "\n", "\r", "\r\n", "\t", "\v", "x"],
    ["<|endoftext|>", "<|", "|>", "endoftext", " "],
)
NUMBERS = (
    *(
        "0",
        "-0",
        "1",
        "-1",
        "7",
        "1_000",
        "1__0",
        "0x10",
        "1e3",
        "1e400",
        "-1e400",
        "nan",
        "inf",
        "-inf",
        "NaN",
    ),
    *(str(2**31), str(2**63), str(2**64), str(-(2**63) - 1), "9" * 5000, "0." + "0" * 400 + "1", "1.5", ".5"),
    *("\u0661", "\uff11", "1 ", "+1", "1j", "0b1", "true"),
)
# No hostile path may be one that a command can create outside its folder.
PATHS = ("", "/dev/zero", "/dev/null", "missing/x", "~", "~nosuchuser/x", "a\0b", "n" * 300, "/proc/self/mem")
PATHS += (".", "..", "[", "[a", "**/*.none", "\udcff.txt", "/dev/stdin/x", "fifo", "self", "folder", "file")


def text(rng: Random, most: int = 60) -> str:
    """Text from a few of ALPHABETS; rarely a long run of one character."""
    if rng.random() < 0.02:
        return rng.choice(rng.choice(ALPHABETS)) * rng.choice((300, 3000))
    return "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randint(0, most)))


def tree(rng: Random, depth: int = 0) -> Any:
    """A value that JSON can hold, of any shape."""
    chance = rng.random()
    if depth < 4 and chance < 0.25:
        return {text(rng, 6): tree(rng, depth + 1) for _ in range(rng.randint(0, 4))}
    if depth < 4 and chance < 0.45:
        return [tree(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    scalars: tuple[Any, ...] = (
        *(None, True, False, 0, -1, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf")),
        *(text(rng, 12), text(rng, 3), rng.randint(-9, 9)),
    )
    return rng.choice(scalars)


def json_bytes(rng: Random, keys: Sequence[str] = ()) -> bytes:
    """JSON or nearly: objects with known `keys`, deep nesting, huge numbers, duplicate keys, bad bytes."""
    chance = rng.random()
    if chance < 0.05:
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        depth = rng.choice((500, 5000, 100_000))
        return ((opening * depth) + "0" + closing * (depth if rng.random() < 0.7 else 0)).encode()
    if chance < 0.1:
        return b'{"n_layer": ' + rng.choice(NUMBERS).encode() * rng.choice((1, 3)) + b"}"
    if chance < 0.15:
        pair = f'"{rng.choice(keys or ["a"])}": {rng.choice(NUMBERS)}'
        return f"{{{pair}, {pair}}}".encode("utf-8", "surrogatepass")
    value = {rng.choice(keys): tree(rng, 2) for _ in range(rng.randint(1, 4))} if keys else tree(rng)
    content = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3 and content:
        cut = rng.randrange(len(content))
        content = (
            content[:cut] + rng.choice((b"", b"\xff", b"\0", b"}", b'"', b"\xef\xbb\xbf")) + content[cut:]
        )
    return content


def toml(rng: Random, tables: Mapping[str, Sequence[str]]) -> bytes:
    """A TOML file with valid tables and keys and hostile values, or a broken one."""
    values: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(NUMBERS),
        lambda: json.dumps(text(rng, 12)),
        lambda: "'" + text(rng, 12).replace("'", "") + "'",
        lambda: "[" + ", ".join(rng.choice(NUMBERS) for _ in range(rng.randint(0, 3))) + "]",
        lambda: json.dumps([rng.choice(PATHS), "x"]),
        lambda: "[" * rng.choice((1, 50, 3000)) + "]" * rng.choice((1, 50, 3000)),
        lambda: "{a = {b = 1}}",
        lambda: rng.choice(("1979-05-27T07:32:00Z", "1979-05-27", "07:32:00", "true", "false", "none")),
        lambda: rng.choice(('"char"', '"gpt2"', '"none"', '"auto"', '"cpu"', "1e-3", "2", "0.5")),
        lambda: '"""' + text(rng, 20).replace('"', "") + '"""',
    )
    lines = []
    for table in rng.sample(list(tables), rng.randint(1, len(tables))):
        lines.append(rng.choice((f"[{table}]",) * 6 + (f"[[{table}]]", f"[{table}.x]", f"[{text(rng, 4)}]")))
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(tables[table]) if rng.random() < 0.9 else json.dumps(text(rng, 6))
            lines.append(f"{name} = {rng.choice(values)()}")
    if rng.random() < 0.05:
        lines.append("a" + ".a" * rng.choice((50, 5000)) + " = 1")
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        cut = rng.randrange(len(content))
        content = content[:cut] + rng.choice((b"\xff", b"\0", b"=", b"]", b'"', b"\r")) + content[cut:]
    return content


def arguments(rng: Random, flags: Mapping[str, Any]) -> list[str]:
    """A command line of known flags with hostile values."""
    argv: list[str] = []
    for _ in range(rng.randint(1, 4)):
        flag = f"--{rng.choice(list(flags))}" if rng.random() < 0.93 else f"--{text(rng, 8)}"
        if rng.random() < 0.2:
            flag = flag.replace("_", "-")
        value = rng.choice(
            (
                rng.choice(NUMBERS),
                rng.choice(NUMBERS),
                rng.choice(PATHS),
                text(rng, 10),
                rng.choice(
                    ("true", "none", "cpu", "cuda", "meta", "auto", "char", "adamw", "muon", "gpt2", "h200")
                ),
            )
        )
        value = value.replace("\0", "") if rng.random() < 0.9 else value
        argv += rng.choice(
            ([flag, value],) * 8 + ([f"{flag}={value}"], [flag], [value], [flag, value, value])
        )
    return argv


DTYPES = (
    "F32",
    "F32",
    "F32",
    "F16",
    "BF16",
    "F64",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "C64",
    "F31",
    "",
    3,
    None,
)


def safetensors(rng: Random, valid: bytes) -> bytes:
    """A safetensors file: its length field, header or data do not fit each other."""
    size = int.from_bytes(valid[:8], "little")
    header: dict[str, Any] = json.loads(valid[8 : 8 + size])
    data = valid[8 + size :]
    for _ in range(rng.randint(1, 2)):
        name = rng.choice([n for n in header if n != "__metadata__"] or ["a"])
        entry = header.get(name)
        entry = dict(entry) if isinstance(entry, dict) else {}
        length = rng.choice((0, 1, -1, 2**40, 2**63, 2**64, 10**30, len(data), len(data) + 1, 0.5, None, "1"))
        change = rng.randrange(9)
        if change == 0:
            entry["dtype"] = rng.choice(DTYPES)
        elif change == 1:
            entry["shape"] = rng.choice(([length], [length, 0], [2, length], [], [1] * 500, "x", None))
        elif change == 2:
            entry["data_offsets"] = rng.choice(([0, length], [length, 0], [length, length], [], [0], "x"))
        elif change == 3:
            header[text(rng, 8)] = tree(rng, 2)
            continue
        elif change == 4:
            header["__metadata__"] = rng.choice(({"format": "pt"}, {"a": 1}, [], None, {"a": {}}))
            continue
        elif change == 5:
            header.pop(name, None)
            continue
        elif change == 6:
            entry = rng.choice(({}, [], None, {**entry, "x": 1}, {"dtype": "F32"}))
        elif change == 7:
            header[f"{name}.{rng.choice(('weight', 'bias', '_orig_mod', ''))}"] = dict(entry)
            continue
        else:
            begin = rng.randrange(len(data)) if data else 0
            entry = {"dtype": "F32", "shape": [0], "data_offsets": [begin, begin]}
        header[name] = entry
    content = json.dumps(header).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        pair = content[1:-1]
        content = b"{" + pair + b", " + pair + b"}"
    if rng.random() < 0.1:
        content = rng.choice((json_bytes(rng), b"{" * 5000, b"", b"{}", b'{"a":' * 3000))
    length = len(content)
    if rng.random() < 0.15:
        length = rng.choice((0, 1, length - 1, length + 1, length + len(data), 2**31, 2**63, 2**64 - 1))
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data) + 1)] + bytes(rng.choice((0, 0, 4, 64)))
    return (max(0, length) % 2**64).to_bytes(8, "little") + content + data


# Pieces of pickles. Each is a few opcodes; a stream of them need not make sense.
def _string(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _storage(kind: str, key: str, count: int) -> bytes:
    number = b"\x8a\x09" + (count % 2**71).to_bytes(9, "little")
    return b"(" + _string("storage") + _global("torch", kind) + _string(key) + _string("cpu") + number + b"tQ"


def _tensor(rng: Random) -> bytes:
    kinds = ("FloatStorage", "HalfStorage", "LongStorage", "UntypedStorage", "BoolStorage", "QUInt8Storage")
    count = rng.choice((4, 4, 4, 0, 2**40, 2**62, 3))
    size, stride = (
        rng.choice((b"K\x04\x85", b"K\x02K\x02\x86", b")", b"J\xff\xff\xff\xff\x85", b"J\0\0\0\x7f\x85")),
        b"",
    )
    stride = rng.choice((b"K\x01\x85", b"K\x00\x85", b"K\x02K\x01\x86", b")", b"J\xff\xff\xff\x7f\x85"))
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + _storage(rng.choice(kinds), rng.choice(("0", "0", "0", "1", "../0")), count)
        + rng.choice((b"K\x00", b"K\x00", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff"))
        + size
        + stride
        + rng.choice((b"\x89", b"\x88", b"N"))
        + _global("collections", "OrderedDict")
        + b")R"
        + b"tR"
    )


def pickled(rng: Random, canary: str) -> bytes:
    """A pickle: an almost valid state_dict, a bomb, code that touches `canary`, or random opcodes."""
    chance = rng.random()
    if chance < 0.06:
        depth = rng.choice((20, 1000, 100_000))
        body = rng.choice(
            (b")" + b"\x85" * depth, b")" + b"2\x86" * min(depth, 40), b"]" + b"]a" * 0 + b"(l" * depth)
        )
        return b"\x80\x02}" + rng.choice((_string("a") + body, body + b"N")) + b"s."
    if chance < 0.12:
        size = rng.choice((2**31, 2**40, 2**62, 100))
        bomb = rng.choice(
            (
                b"\x8b" + struct.pack("<i", rng.choice((-1, 2**31 - 1, 4))) + b"\1\0\0\0",
                b"\x8e" + struct.pack("<Q", size) + b"x",
                b"\x96" + struct.pack("<Q", size) + b"x",
                b"r" + struct.pack("<I", 2**32 - 1),
                b"Nq\xff" + b"h\xff" * 50,
                b"I" + b"9" * 100_000 + b"\n",
                b"c__builtin__\nbytearray\n" + b"J\xff\xff\xff\x7f\x85R",
                b"ctorch\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R",
                b"ctorch._utils\n_rebuild_parameter\n)R",
                b"\x95" + struct.pack("<Q", size) + b"N",
            )
        )
        return b"\x80\x04}" + _string("a") + bomb + b"s."
    if chance < 0.3:
        command = f"touch {canary}"
        code = rng.choice(
            (
                _global("os", "system") + b"(" + _string(command) + b"tR",
                _string("os") + _string("system") + b"\x93(" + _string(command) + b"tR",
                b"(" + _string(command) + b"ios\nsystem\n",
                _global("builtins", "eval") + b"(" + _string(f"open({canary!r}, 'w')") + b"tR",
                _global("builtins", "exec") + b"(" + _string(f"open({canary!r}, 'w')") + b"tR",
                _global("subprocess", "check_output") + b"((" + _string("touch") + _string(canary) + b"ltR",
                _global("torch", "load") + b"(" + _string(canary) + b"tR",
                _global("torch.hub", "load") + b"(" + _string("a/b") + _string("c") + b"tR",
                _global("torch.serialization", "load") + b"(" + _string(canary) + b"tR",
                b"\x82\x01",
            )
        )
        return b"\x80\x04}" + _string("a") + code + b"s."
    if chance < 0.7:
        entries = b"".join(_string(text(rng, 8)) + _tensor(rng) + b"s" for _ in range(rng.randint(1, 3)))
        return b"\x80\x02}" + entries + b"."
    pieces = (
        *(
            b"(",
            b"t",
            b"l",
            b"d",
            b"]",
            b")",
            b"}",
            b"a",
            b"e",
            b"s",
            b"u",
            b"0",
            b"1",
            b"2",
            b"N",
            b"R",
            b"b",
        ),
        *(
            b"\x81",
            b"\x85",
            b"\x86",
            b"\x87",
            b"\x88",
            b"Q",
            b"K\x05",
            b"J\xff\xff\xff\xff",
            b"q\0",
            b"h\0",
            b".",
        ),
        *(
            b"G" + struct.pack(">d", 1e308),
            b"\x8f",
            b"\x90",
            b"\x91",
            b"\x94",
            b"V\\ud800\n",
            b"F1e400\n",
            b"I01\n",
        ),
        *(
            _string("a"),
            _global("collections", "OrderedDict"),
            _global("torch", "Size"),
            _global("torch", "device"),
        ),
        *(_tensor(rng), _storage("FloatStorage", "0", 4), rng.randbytes(rng.randint(1, 4))),
    )
    return b"\x80\x02" + b"".join(rng.choice(pieces) for _ in range(rng.randint(1, 30))) + b"."


def torch_file(rng: Random, canary: str) -> bytes:
    """What torch.save writes, with a hostile pickle or archive."""
    content = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(content, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled(rng, canary))
        for name, data in (("byteorder", b"little"), ("data/0", bytes(16)), ("version", b"3\n")):
            if rng.random() < 0.97:
                archive.writestr(f"archive/{name}", data)
        if rng.random() < 0.03:
            archive.writestr(rng.choice(("x/data.pkl", "archive/data.pkl ", "../x")), b"N.")
    raw = content.getvalue()
    if rng.random() < 0.1:
        cut = rng.randrange(len(raw))
        raw = raw[:cut] + rng.choice((b"", b"\xff", bytes(8))) + raw[cut + rng.randint(0, 8) :]
    return raw

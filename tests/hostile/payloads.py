"""Hostile pickles and archives for a folder of weights; each would create a file if it were loaded."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch


class Runs:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def touch(marker: Path) -> Runs:
    return Runs(os.system, f"touch {marker}")


def text_opcodes(opcodes: str) -> Callable[[Path], bytes]:
    """A pickle written by hand; `$` becomes the marker's path."""
    return lambda marker: opcodes.replace("$", str(marker)).encode()


def dump(build: Callable[[Path], object], protocol: int = 2) -> Callable[[Path], bytes]:
    return lambda marker: pickle.dumps(build(marker), protocol=protocol)


# Different ways in which a pickle can run a program.
PICKLES: dict[str, Callable[[Path], bytes]] = {
    "os.system, protocol 0": dump(touch, 0),
    "os.system, protocol 2": dump(touch, 2),
    "os.system, protocol 4": dump(touch, 4),
    "os.system, protocol 5": dump(touch, 5),
    "within a list": dump(lambda marker: [1, [2, touch(marker)]]),
    "as a key's value": dump(lambda marker: {"weight": torch.Size([1]), "more": touch(marker)}),
    "as an argument of what is allowed": dump(lambda marker: Runs(OrderedDict, [(1, touch(marker))])),
    "eval": dump(lambda marker: Runs(eval, f"__import__('os').system('touch {marker}')")),
    "exec": dump(lambda marker: Runs(exec, f"open('{marker}', 'w')")),
    "getattr": text_opcodes(
        "c__builtin__\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'system'\ntR(S'touch $'\ntR."
    ),
    "a file opened": dump(lambda marker: Runs(open, str(marker), "w")),
    "INST": text_opcodes("(S'touch $'\nios\nsystem\n."),
    "OBJ": text_opcodes("(cos\nsystem\nS'touch $'\no."),
    "GLOBAL, REDUCE, POP": text_opcodes("cos\nsystem\n(S'touch $'\ntR0N."),
    "kept in the memo": text_opcodes("cos\nsystem\np0\n0g0\n(S'touch $'\ntR."),
    "STACK_GLOBAL of joined names": text_opcodes("\x80\x04\x8c\x02os\x8c\x06system\x93(S'touch $'\ntR."),
    "an attribute by a dotted name": text_opcodes("\x80\x04\x8c\x05torch\x8c\x0eos_alias.system\x93(S'touch $'\ntR."),
    "torch's own loader": dump(lambda marker: Runs(torch.storage._load_from_bytes, pickle.dumps(touch(marker)))),
    "torch.load": dump(lambda marker: Runs(torch.load, str(marker))),
    "subprocess": text_opcodes("csubprocess\ncall\n((lp0\nS'touch'\naS'$'\natR."),
    "runpy": text_opcodes('crunpy\n_run_code\n(S\'open("$","w")\'\n}tR.'),
    "a module by its import": text_opcodes("cantigravity\nfly\n."),
    "webbrowser": text_opcodes("cwebbrowser\nopen\n(S'file://$'\ntR."),
    "numpy's exec": text_opcodes('cnumpy.testing._private.utils\nrunstring\n(S\'open("$","w")\'\n}tR.'),
    "after the first pickle's names": text_opcodes("ccollections\nOrderedDict\n)Rp0\n0cos\nsystem\n(S'touch $'\ntR."),
    "BUILD with a state": text_opcodes("cargparse\nNamespace\n)R(dS'x'\ncos\nsystem\n(S'touch $'\ntRsb."),
    "a class of dpokit": text_opcodes("cdpokit.sweep.trial\nTrialRun\n."),
    "nothing that ends": text_opcodes("(lp0\n"),
    "no pickle": text_opcodes("GIF89a $"),
}


def archive(content: bytes, **more: bytes) -> bytes:
    """The zip archive that `torch.save` writes, with `content` as its pickle."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    with zipfile.ZipFile(buffer) as honest:
        files = {entry.filename: honest.read(entry) for entry in honest.infolist()}
    (root,) = {name.partition("/")[0] for name in files}
    files[f"{root}/data.pkl"] = content
    return pack({**files, **{f"{root}/{name.replace('_dot_', '.')}": value for name, value in more.items()}})


def pack(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name, content in files.items():
            made.writestr(name, content)
    return buffer.getvalue()


def honest_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    return buffer.getvalue()


def comment(content: bytes, text: bytes) -> bytes:
    """The archive with a comment at its end."""
    return content[:-2] + struct.pack("<H", len(text)) + text


def hostile(marker: Path) -> bytes:
    return PICKLES["os.system, protocol 2"](marker)


def twice(marker: Path) -> bytes:
    """An archive with two entries of one name: readers may take the first or the last."""
    buffer = io.BytesIO(archive(hostile(marker)))
    with zipfile.ZipFile(buffer, "a") as made:
        root = made.namelist()[0].partition("/")[0]
        made.writestr(f"{root}/data.pkl", pickle.dumps({}, protocol=2))
    return buffer.getvalue()


# Archives in which two readers may find different pickles, or that torch.save does not write.
ARCHIVES: dict[str, Callable[[Path], bytes]] = {
    "a bare pickle": hostile,
    "torch's old form": lambda _: b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, 0)),
    "something before the archive": lambda marker: archive(hostile(marker)) + honest_bytes(),
    "something behind the archive": lambda _: honest_bytes() + b"more",
    "a comment": lambda _: comment(honest_bytes(), b"PK\x05\x06" + bytes(18)),
    "two pickles of one name": twice,
    "a pickle in capitals": lambda marker: archive(pickle.dumps({}, 2), DATA_dot_pkl=hostile(marker)),
    "a TorchScript program": lambda marker: archive(pickle.dumps({}, 2), constants_dot_pkl=hostile(marker)),
    "a second root": lambda marker: pack({"a/data.pkl": pickle.dumps({}, 2), "b/data.pkl": hostile(marker)}),
    "a compressed pickle": lambda marker: pack({"a/data.pkl": hostile(marker)}, zipfile.ZIP_DEFLATED),
    "no pickle in it": lambda _: pack({"a/version": b"3"}),
    "half an archive": lambda _: honest_bytes()[:200],
    "an empty file": lambda _: b"",
}

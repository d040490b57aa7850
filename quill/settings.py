"""Settings: a dataclass of defaults, overridden by config files, overridden by flags.

A command declares its options as a dataclass whose fields are made with `option()`; `load()` makes
an instance from the command line. Config files are plain Python assignments, as in nanoGPT:

    python train.py config/small.py --batch_size=32 --compile false

All problems are reported at once, as one `InputError`.
"""

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path

from quill.errors import InputError, blames_program, reader_may_leave

DType = typing.Literal["auto", "float32", "bfloat16", "float16"]

_UNREADABLE = object()


def option(default, help: str, *, min: float | None = None, max: float | None = None):
    """A dataclass field with its one line of help and, for numbers, its inclusive bounds."""
    return dataclasses.field(default=default, metadata={"help": help, "min": min, "max": max})


def options_of(cls, leave_out: tuple[str, ...] = (), **defaults):
    """A dataclass to inherit from, with the fields of `cls` as options, and some other defaults.

    Their metadata has the help and the bounds, as `option` makes it.
    """
    fields = []
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in leave_out:
            default = defaults.get(field.name, field.default)
            copy = dataclasses.field(default=default, metadata=field.metadata)
            fields.append((field.name, kinds[field.name], copy))
    return dataclasses.make_dataclass(f"{cls.__name__}Options", fields, frozen=True)


def load(cls, argv: list[str], *, usage: str, positional: str | None = None, base=None):
    """Return an instance of the dataclass `cls` for a command line.

    Words that are not flags name config files, or, where `positional` names an option, give that
    option's value. `base` is a dict of values to start from in place of the defaults (unknown
    names in it are ignored: it may come from an older version). Prints help and exits on `--help`.
    """
    types_of = typing.get_type_hints(cls)
    if "--help" in argv or "-h" in argv:
        with reader_may_leave():
            print(_help_text(cls, types_of, usage))
        sys.exit(0)
    words, flags, problems = _split_argv(argv, types_of)
    values: dict = {}
    for name, value in (base or {}).items():
        if name in types_of:
            _assign(values, types_of, name, value, "checkpoint: ", problems)
    if positional:
        flags = [(positional, word) for word in words] + flags
        if len(words) > 1:
            problems.append(f"one {positional} at a time, not {len(words)}: {' '.join(words)}")
        words = []
    for path in words:
        for name, value in _read_config_file(path).items():
            _assign(values, types_of, name, value, f"{path}: ", problems)
    for name, text in flags:
        _assign(values, types_of, name, text, "--", problems, is_text=True)
    for field in dataclasses.fields(cls):
        problems += _bounds_problem(field, values.get(field.name))
    if problems:
        raise InputError("; ".join(problems))
    return cls(**values)


def config_files(cls, argv: list[str]) -> list[str]:
    """Those of a command line, without its flags."""
    return _split_argv(argv, typing.get_type_hints(cls))[0]


def _split_argv(argv, types_of):
    """-> (words, [(name, text)], problems); `--key=value` and `--key value` are the same.

    A boolean option without a value, before another flag or a config file or last, is true.
    argparse would take the config file as its value, refuse `--start -x`, and report one problem.
    """
    words, flags, problems = [], [], []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        has_no_value = not rest or rest[0].startswith("--") or rest[0].endswith(".py")
        if not equals and has_no_value and bool in _alternatives(types_of.get(name)):
            text = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                problems.append(
                    f"--{name} needs a value: --{name}=VALUE (--help lists all options)"
                )
                continue
            text = rest.pop(0)
        flags.append((name, text))
    return words, flags, problems


def run_program(path: str, what: str) -> dict:
    """What a Python file of the user's defines, by name. what: its kind, for errors.

    Only source text is run: runpy would also run what is in an archive, as checkpoints are. Raises
    InputError for anything else, and for whatever the program raises.
    """
    with blames_program(path, f"{what} {path}"):  # Path.exists can raise: for a NUL byte
        is_special = Path(path).exists() and not Path(path).is_file()
    if is_special:
        raise InputError(f"{path} is a folder or pipe, no {what}; options are --NAME=VALUE")
    module = types.ModuleType(f"<{path}>")
    module.__file__ = path
    with blames_program(path, f"{what} {path}"):
        source = Path(path).read_bytes()
        if b"\0" not in source:
            sys.modules[module.__name__] = module  # where dataclasses look while it runs
            try:
                exec(compile(source, path, "exec"), vars(module))
            finally:
                sys.modules.pop(module.__name__, None)
            return vars(module)
    raise InputError(
        f"{what} {path}: not a text; a checkpoint is given by --init_from or --out_dir"
    )


def _read_config_file(path: str) -> dict:
    """What a Python file assigns to public names, but for modules, functions and classes."""
    if path.startswith("-"):
        raise InputError(f"{path}: options start with two dashes")
    names = run_program(path, "config file")
    tools = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {
        name: value
        for name, value in names.items()
        if type(name) is str and not name.startswith("_") and not issubclass(type(value), tools)
    }


def _assign(values, types_of, name, value, source, problems, is_text=False):
    if name not in types_of:
        hint = did_you_mean(name, types_of) or " (--help lists all options)"
        problems.append(f"{source}{name}: no such option{hint}")
        return
    if type(value) is str and re.search("[\0\ud800-\udfff]", value):
        encoding = sys.getfilesystemencoding()
        problems.append(f"{source}{name}: {value[:100]!r} is not {encoding} text without NUL")
        return
    for kind in _alternatives(types_of[name]):
        parsed = _from_text(kind, value) if is_text else _from_python(kind, value)
        if parsed is not _UNREADABLE:
            values[name] = parsed
            return
    problems.append(f"{source}{name}: expected {_type_name(types_of[name])}, got {_shown(value)}")


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The known name that is closest, as the end of a message; empty where none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def _alternatives(annotation) -> list:
    """The simple types and single literal values that a field accepts."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [kind for part in typing.get_args(annotation) for kind in _alternatives(part)]
    if typing.get_origin(annotation) is typing.Literal:
        return [typing.Literal[choice] for choice in typing.get_args(annotation)]
    return [annotation]


def _from_text(kind, text: str):
    if typing.get_origin(kind) is typing.Literal:
        return _from_python(kind, text)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), _UNREADABLE)
    try:
        return _from_python(kind, kind(text))
    except ValueError:
        return _UNREADABLE


def _shown(value) -> str:
    try:
        return repr(value)[:100]
    except BaseException:  # of a config's own class; or ValueError, of thousands of digits
        return f"a value of type {type(value).__name__} that cannot be shown"


def _from_python(kind, value):
    if typing.get_origin(kind) is typing.Literal:
        is_choice = type(value) is str and value in typing.get_args(kind)
        return value if is_choice else _UNREADABLE
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        return _UNREADABLE
    return value


def _bounds_problem(field, value) -> list[str]:
    low, high = field.metadata.get("min"), field.metadata.get("max")
    if type(value) is int:  # what PyTorch can hold
        low = -(2**63) if low is None else low
        high = 2**63 - 1 if high is None else high
    is_number = isinstance(value, (int, float))
    if is_number and low is not None and value < low:
        return [f"{field.name}={_shown(value)}: must be at least {low}"]
    if is_number and high is not None and value > high:
        return [f"{field.name}={_shown(value)}: must be at most {high}"]
    return []


def _type_name(annotation) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    kinds = _alternatives(annotation)
    return " or ".join(names.get(k) or repr(typing.get_args(k)[0]) for k in kinds)


def _help_text(cls, types_of, usage: str) -> str:
    lines = [usage.strip(), "", "options (as --NAME=VALUE, or NAME = VALUE in a config file):"]
    # The command's own options first, then those that it inherits.
    for field in sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__):
        kinds = _alternatives(types_of[field.name])
        choices = [typing.get_args(k)[0] for k in kinds if typing.get_origin(k) is typing.Literal]
        note = f" ({' | '.join(choices)})" if len(choices) > 1 else ""
        name = f"  --{field.name}={field.default!r}"
        lines.append(f"{name:<42} {field.metadata['help']}{note}")
    return "\n".join(lines)

"""Generated input of every kind: it works, or it is refused with exit code 2 and one line."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import runpy
import struct
import typing
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import TINY, edit_meta, is_one_error_line, seal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
import sample
import train
from quill import errors, plot
from quill.training import checkpoint

slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore")  # a user may see numpy's; here they would fail


def examples(short: int, long: int):
    return pytest.mark.parametrize("n", [short, pytest.param(long, marks=slow)])


def fuzz(n: int, **strategies):
    """Call the decorated function with n generated inputs, always the same ones."""

    def run(function):
        checks = [*HealthCheck]
        options = settings(
            max_examples=n, database=None, derandomize=True,
            suppress_health_check=checks,
        )  # fmt: skip
        options(given(**strategies)(function))()

    return run


def assert_works_or_refuses(call, script: str, argv: list[str]) -> int:
    code, _, err = call(script, *argv)
    if code == 1:  # the input was good and led to numbers that are not
        assert is_one_error_line(err) and ("not finite" in err or "out of memory" in err), err
    elif code == 2:
        assert is_one_error_line(err), err
    else:
        assert code == 0 and "error" not in err, (code, err)
    return code


# ---- command lines and config files ------------------------------------------------------------

# A large number is a good value for these, of which the run would take hours.
UNENDING = {"max_iters", "batch_size", "gradient_accumulation_steps", "n_layer", "num_samples"}
UNENDING |= {"max_new_tokens", "eval_iters", "skip_nonfinite", "sample_at_eval"}
# Minutes to compile, a network, a terminal.
UNTOUCHED = {"compile", "compile_mode", "wandb_log", "interactive"}
NUMBERS = ["0", "1", "2", "3", "7", "-1", "0.5", "1e-3", "1e400", "-inf", "nan", "1_0", "٣", "0x10"]
LARGE = ["1000000", "9" * 30, "1e30"]
WORDS = ["", " ", "true", "False", "none", "[]", "é", "a/b", "..", "../up", "x" * 300, "~", "$HOME"]
WORDS += [
    "--",
    "-",
    "=",
    "%s",
    "{}",
    "out",
    "tiny",
    "text.txt",
    "FILE:text.txt",
    "FILE:",
    "FILE:..",
]
WORDS += ["auto", "cpu", "cuda", "cuda:-1", "cpu:0", "mps", "meta", "char", "byte", "a.json"]
SCRIPTS = {
    "train": (train.TrainConfig, [*TINY, "--max_iters=2", "--eval_interval=1"]),
    "sample": (sample.SampleConfig, ["--out_dir=made", "--num_samples=2", "--max_new_tokens=5"]),
    "prepare": (prepare.PrepareConfig, ["mine", "--input=text.txt"]),
    "plot": (plot.PlotConfig, ["--out_dir=made"]),
}


def fitting(kind) -> list[str]:
    """Words that a field of that type may well accept."""
    if choices := [str(choice) for choice in typing.get_args(kind)]:
        return choices
    return {bool: ["true", "False"], int: NUMBERS[:5], float: NUMBERS[:8]}.get(kind, WORDS)


@st.composite
def command_lines(draw):
    script = draw(st.sampled_from([*SCRIPTS]))
    config, argv = SCRIPTS[script]
    types_of = typing.get_type_hints(config)
    argv = [*argv]
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*types_of]))
        if name in UNTOUCHED:
            continue
        anything = [*NUMBERS, *WORDS] + (LARGE if name not in UNENDING else [])
        text = st.text(st.characters(blacklist_characters="\0"), max_size=8)
        value = draw(st.sampled_from(fitting(types_of[name])) | st.sampled_from(anything) | text)
        argv += draw(st.sampled_from([[f"--{name}={value}"], [f"--{name}", value]]))
    if draw(st.integers(0, 4)) == 0:
        argv.append(draw(st.sampled_from(["--", "-x", "x.py", "--n", "=", "--=1", "é"])))
    return script, argv


@pytest.fixture
def made(tiny, call):
    """`tiny` and a run, `made`, of a tokenizer by bytes: any prompt fits it."""
    call("prepare", "tiny", "--input=text.txt", "--tokenizer=byte")
    assert call("train", *TINY, "--out_dir=made", "--average_decay=0.5")[0] == 0
    return tiny


@examples(120, 4000)
def test_any_command_line(made, call, n):
    codes = []

    @fuzz(n, line=command_lines())
    def run(line):
        codes.append(assert_works_or_refuses(call, *line))

    assert codes.count(0) > len(codes) / 20 and codes.count(2) > len(codes) / 20
    print(f"\n{len(codes):,} command lines: {codes.count(0):,} ran, {codes.count(2):,} refused")
    assert not (made.parent / "up").exists()


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
values = st.recursive(
    plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)


@examples(60, 2000)
def test_any_config_file(made, call, n):
    names = [name for name in train.TrainConfig.__dataclass_fields__ if name not in UNTOUCHED]
    lines = st.tuples(st.sampled_from(names), values).map(lambda pair: f"{pair[0]} = {pair[1]!r}")
    lines |= st.sampled_from(["seed = 3", "dropout = 0.1", "import time", "# é", "bias = True"])
    odd = st.sampled_from(["import os", "1/0", "(" * 300, "raise SystemExit(0)", "x = nan", "\0"])
    small = ["--max_iters=1", "--batch_size=4", "--gradient_accumulation_steps=1", "--n_layer=1"]
    small += ["--n_embd=16", "--n_head=2", "--eval_iters=1", "--skip_nonfinite=0"]
    codes = []

    @fuzz(n, parts=st.lists(lines | odd | st.text(max_size=9), max_size=3))
    def run(parts):
        Path("any.py").write_bytes("\n".join(parts).encode("utf-8", "surrogatepass"))
        codes.append(assert_works_or_refuses(call, "train", [*TINY, "any.py", *small]))

    print(f"\n{len(codes):,} config files: {codes.count(0):,} ran, {codes.count(2):,} refused")


# ---- datasets, prompts, checkpoints ------------------------------------------------------------


@examples(60, 1500)
def test_any_meta_json(made, call, n):
    """With the right checksum, as somebody would make it who wants it to be read."""
    before = Path("data/tiny/meta.json").read_text()
    names = ["format_version", "dtype", "vocab_size", "train_tokens", "val_tokens", "tokenizer"]
    names += ["source", "sha256", "train_sha256", "val_sha256", "more"]
    kinds = st.fixed_dictionaries(
        {"kind": st.sampled_from(["char", "byte", "gpt2", "x"])},
        optional={"chars": values, "tokens": values | st.just("YQ=="), "special": values},
    )
    codes = []

    @fuzz(n, changes=st.dictionaries(st.sampled_from(names), values | kinds, max_size=2))
    def run(changes):
        Path("data/tiny/meta.json").write_text(before)
        edit_meta("data/tiny", **changes)
        codes.append(assert_works_or_refuses(call, "train", [*TINY, "--max_iters=0"]))

    print(f"\n{len(codes):,} meta.json: {codes.count(0):,} ran, {codes.count(2):,} refused")


@examples(40, 1000)
def test_any_prompt(made, call, n):
    codes = []

    @fuzz(n, prompt=st.text(max_size=40), stop=st.text(max_size=3), is_file=st.booleans())
    def run(prompt, stop, is_file):
        Path("prompt.txt").write_bytes(prompt.encode("utf-8", "surrogatepass"))
        start = "FILE:prompt.txt" if is_file else prompt
        argv = ["--out_dir=made", "--num_samples=2", "--max_new_tokens=20", "--device=cpu"]
        codes.append(
            assert_works_or_refuses(call, "sample", [*argv, f"--start={start}", f"--stop={stop}"])
        )

    print(f"\n{len(codes):,} prompts: {codes.count(0):,} ran, {codes.count(2):,} refused")


def places(value, path=()):
    """Every place in a checkpoint, as the keys that lead there."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, part in items:
        yield from places(part, (*path, key))


odd_tensors = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(0),
        torch.full((16,), float("nan")),
        torch.full((30, 16), 3e38),
        torch.zeros(1).expand(10**12),
        torch.zeros(16, dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
        torch.zeros(3, 3).T[1:],
    ]
)


@examples(60, 1500)
def test_any_checkpoint(made, call, n):
    """One place in it is something else; its checksum is right."""
    saved = checkpoint.load_checkpoint(Path("made/ckpt.pt"), for_resume=True)
    Path("made/best.pt").unlink()
    whole = Path("made/ckpt.pt").read_bytes()
    everywhere = [path for path in places(saved) if path]
    near = [path for path in everywhere if "state" not in path]
    Path("made/ckpt.previous.pt").unlink()
    codes = []

    @fuzz(n, path=st.sampled_from(near) | st.sampled_from(everywhere), value=values | odd_tensors)
    def run(path, value):
        changed = copy.deepcopy(saved)
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        if path[0] == "config" and path[-1] in UNENDING | UNTOUCHED:
            return  # a good value may make it a long run
        checkpoint.save_checkpoint(Path("made/ckpt.pt"), changed)
        argv = ["--out_dir=made", "--num_samples=1", "--max_new_tokens=5", "--device=cpu"]
        codes.append(assert_works_or_refuses(call, "sample", argv))
        argv = ["--out_dir=made", "--init_from=resume", "--max_iters=6", "--compile=false"]
        codes.append(assert_works_or_refuses(call, "train", argv))
        Path("made/ckpt.previous.pt").unlink(missing_ok=True)
        Path("made/ckpt.pt").write_bytes(whole)

    print(
        f"\n{len(codes):,} uses of checkpoints: {codes.count(0):,} ran, {codes.count(2):,} refused"
    )


# ---- malice ------------------------------------------------------------------------------------


class Call:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def endless():
    """A list that contains itself."""
    value: list = []
    value.append(value)
    return value


def laughing():
    """Sixty lists, each twice the one before: 2^60 values in a few hundred bytes."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    return value


def deep():
    value: list = []
    for _ in range(200):
        value = [value]
    return value


MALICE = {
    "os.system": lambda: Call(os.system, "touch executed"),
    "eval": lambda: Call(eval, "open('executed', 'w')"),
    "exec": lambda: Call(exec, "open('executed', 'w')"),
    "runpy": lambda: Call(runpy.run_path, "payload.py"),
    "getattr": lambda: Call(getattr, Path("executed"), "touch"),
    "a file's constructor": lambda: Call(open, "executed", "w"),
    "torch.load inside": lambda: Call(torch.load, "inner.pt"),
    "a list in itself": endless,
    "a billion laughs": laughing,
    "nested deeply": deep,
    "an expanded tensor": lambda: torch.zeros(1).expand(10**13),
}


def forge(path: Path, how: str, where: str, contents: dict) -> None:
    """Put the malice of that name into a checkpoint, with the checksum that it should have."""
    contents = copy.deepcopy(contents)
    (contents if where == "top" else contents[where])["extra"] = MALICE[how]()
    torch.save({"quill_checkpoint": checkpoint.SCHEMA_VERSION, **contents}, path)
    seal(path)


@pytest.mark.parametrize("where", ["top", "model", "config", "tokenizer", "progress"])
@pytest.mark.parametrize("how", [*MALICE])
def test_malice_in_a_checkpoint_is_neither_run_nor_unpacked(made, call, how, where):
    Path("payload.py").write_text("open('executed', 'w')")
    torch.save(Call(os.system, "touch executed"), "inner.pt")
    contents = checkpoint.load_checkpoint(Path("made/ckpt.pt"), for_resume=True)
    forge(Path("made/best.pt"), how, where, contents)
    forge(Path("made/ckpt.pt"), how, where, contents)
    Path("made/ckpt.previous.pt").unlink()
    peak = peak_megabytes()
    assert call("sample", "--out_dir=made")[0] == 2
    code, _, err = call("train", "--out_dir=made", "--init_from=resume")
    assert code == 2 and is_one_error_line(err) and not Path("executed").exists()
    assert peak_megabytes() - peak < 100


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def archive(path: Path, pickled: bytes, record: bytes, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "data/0": record}.items():
            file.writestr(f"a/{name}", data)
        file.writestr("a/version", "3\n")
    seal(path)


def pickled_tensor(n_stored: int, n_claimed: int) -> bytes:
    """The pickle of {"model": tensor}, of n_claimed numbers of which n_stored are in the file."""

    def number(n: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", n)

    def text(word: str) -> bytes:
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    storage = text("storage") + b"ctorch\nLongStorage\n" + text("0") + text("cpu")
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + number(n_stored) + b"tQ"
    tensor += number(0) + b"(" + number(n_claimed) + b"t(" + number(1) + b"t"
    tensor += b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}(" + text("model") + tensor + b"u."


@pytest.mark.parametrize(
    ("pickled", "record", "compression"),
    [
        (pickled_tensor(10**12, 10**12), bytes(80), zipfile.ZIP_STORED),
        (pickled_tensor(10, 10**12), bytes(80), zipfile.ZIP_STORED),
        (pickled_tensor(10**7, 10**7), bytes(80), zipfile.ZIP_STORED),
        (pickled_tensor(5 * 10**7, 5 * 10**7), bytes(4 * 10**8), zipfile.ZIP_DEFLATED),
        (b"\x80\x02" + b"]" * 10**6 + b".", bytes(80), zipfile.ZIP_STORED),
        (b"\x80\x02](" + b"N" * 10**7 + b"e.", bytes(80), zipfile.ZIP_STORED),
        (b"\x80\x02](" + b"N" * 2 * 10**7 + b"e.", bytes(80), zipfile.ZIP_STORED),
        (b"\x80\x04\x8d" + struct.pack("<Q", 10**15) + b".", bytes(80), zipfile.ZIP_STORED),
        (b"\x80\x02X" + struct.pack("<I", 4 * 10**9) + b".", bytes(80), zipfile.ZIP_STORED),
        (b"\x80\x02r" + struct.pack("<I", 4 * 10**9) + b".", bytes(80), zipfile.ZIP_STORED),
        (b"", bytes(80), zipfile.ZIP_STORED),
        (pickle.dumps(os.system), bytes(80), zipfile.ZIP_STORED),
    ],
)
def test_a_small_file_that_claims_much_is_refused(folder, pickled, record, compression):
    archive(folder / "x.pt", pickled, record, compression)
    del record
    peak = peak_megabytes()
    with pytest.raises(errors.InputError, match=r"x\.pt"):
        checkpoint.load_checkpoint(folder / "x.pt")
    assert peak_megabytes() - peak < 200


@pytest.mark.parametrize("damage", ["no table of contents", "overlapping parts"])
def test_an_archive_that_lies_about_its_parts_is_refused(folder, damage):
    archive(folder / "x.pt", pickled_tensor(10, 10), bytes(80))
    data = (folder / "x.pt").read_bytes()[: -2 - checkpoint.COMMENT_BYTES] + b"\0\0"
    table = data.index(b"PK\x01\x02")
    if damage == "no table of contents":
        data = data[:table] + data[-22:]
    else:  # one part, listed ten times
        entry = data[table : data.index(b"PK\x01\x02", table + 4)]
        entries = data[table:-22] + entry * 10
        end = bytearray(data[-22:])
        struct.pack_into("<HHI", end, 8, 14, 14, len(entries))
        data = data[:table] + entries + bytes(end)
    (folder / "x.pt").write_bytes(data)
    seal(folder / "x.pt")
    with pytest.raises(errors.InputError, match=r"x\.pt"):
        checkpoint.load_checkpoint(folder / "x.pt")

"""Loading a file of torch.save that a stranger may have made: nothing in it is run, and a small
file cannot take much memory."""

import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from quill.errors import InputError
from quill.training import devices

MAX_DEPTH, MAX_VALUES = 10, 10**6  # of the tree of values
MAX_PICKLE_BYTES = 2**24  # without the tensors; in memory a value takes up to 100 times its byte


def read_archive(path: Path, with_tensors: tuple[str, ...]) -> dict:
    """The dict of plain types that the file holds, with tensors below the keys `with_tensors`.

    Raises `InputError` for anything else.
    """
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused below
            # Memory-mapped, so that several processes on a machine share one copy.
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds more than tensors and plain types: refused, nothing in it was run"
        ) from None
    except (InputError, OSError):
        raise
    except Exception as error:  # a forged file can make torch.load raise anything
        if devices.is_out_of_memory(error):
            raise
        raise InputError(f"{path} is not a checkpoint ({type(error).__name__})") from None
    if not isinstance(contents, dict):
        raise InputError(f"{path} is not a checkpoint ({type(contents).__name__})")
    _check_values(contents, with_tensors, path)
    return contents


def _check_archive(path: Path) -> None:
    """Raise InputError for an archive whose parts are larger, unpacked, than the file itself."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    is_packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    pickles = [part.file_size for part in parts if "pkl" in part.filename]
    n_bytes = sum(part.file_size for part in parts)
    if is_packed or max(pickles, default=0) > MAX_PICKLE_BYTES or n_bytes > path.stat().st_size:
        raise InputError(f"{path} is not a checkpoint: it claims more than it holds")


def _check_values(contents: dict, with_tensors: tuple[str, ...], path: Path) -> None:
    """Raise InputError for what is not a small tree of plain values and tensors stored in full.

    A pickle can share its parts, so that a few bytes claim an endless list or a huge tensor.
    """
    pending = [(value, name in with_tensors, 0) for name, value in contents.items()]
    n_values = 0
    while pending:
        value, may_be_tensor, depth = pending.pop()
        n_values += 1
        if torch.is_tensor(value):
            is_usable = may_be_tensor and _is_stored_in_full(value)
        else:
            is_usable = isinstance(value, (dict, list, tuple, str, int, float, type(None)))
        parts = value if isinstance(value, (dict, list, tuple)) else ()
        n_known = n_values + len(pending) + len(parts)
        if not is_usable or depth > MAX_DEPTH or n_known > MAX_VALUES:
            raise InputError(f"{path} is not a checkpoint: it claims more than it holds")
        parts = (*value, *value.values()) if isinstance(value, dict) else parts
        pending += [(part, may_be_tensor, depth + 1) for part in parts]


def _is_stored_in_full(tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.is_contiguous() and tensor.device.type == "cpu"

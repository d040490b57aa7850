"""Write a run's model and tokenizer as a folder that Hugging Face's transformers loads.

Usage:
    python -m quill.export --out_dir=out DEST

AutoModelForCausalLM and AutoTokenizer load the folder DEST. A model with GPT-2's block becomes a
GPT2LMHeadModel, one with Llama's a LlamaForCausalLM; any other is refused.
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import contextlib
import dataclasses
from pathlib import Path

from quill import settings
from quill.errors import InputError, blames_input, run_command
from quill.files import open_file
from quill.interop import huggingface, pretrained
from quill.settings import option
from quill.training import checkpoint


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    out_dir: str = option("out", "the run's folder: its best.pt is used, else its ckpt.pt")
    dest: str = option("", "the folder to write: a new one, or an earlier export")


def main(argv: list[str]) -> int:
    config = settings.load(ExportConfig, argv, usage=__doc__, positional="dest")
    if not config.dest:
        use = "use: python -m quill.export --out_dir=out DEST (--help says more)"
        raise InputError(f"DEST, the folder to write, is missing; {use}")
    dest = Path(config.dest)
    refuse_to_overwrite(dest)
    path = checkpoint.find_checkpoint(Path(config.out_dir))
    loaded = pretrained.from_run(path)
    model = loaded.build()
    with blames_input(f"{path} cannot be exported", ValueError):
        name = huggingface.export(model, loaded.tokenizer, dest)
    print(f"wrote {dest}: {name} of {sum(p.numel() for p in model.parameters()):,} parameters")
    return 0


def refuse_to_overwrite(dest: Path) -> None:
    """Raise InputError for a folder that holds anything but an earlier export."""
    safetensors = huggingface.import_safetensors()
    if not dest.exists():
        return
    names = {path.name for path in dest.iterdir()}
    if all(name.endswith((".tmp", ".lock")) for name in names):  # left by an export that was killed
        return
    weights = dest / "model.safetensors"
    with contextlib.suppress(OSError, InputError, safetensors.SafetensorError):
        open_file(weights).close()  # or a pipe would make it wait
        if safetensors.safe_open(weights, framework="pt").metadata() == huggingface.PRODUCER:
            return
    raise InputError(f"{dest} is not empty and not an earlier export: choose another folder")


if __name__ == "__main__":
    run_command(main)

"""Look into a model in the browser, and let other programs write with it.

Usage:
    python -m quill.serve --out_dir=out                then open http://127.0.0.1:8000
    python -m quill.serve --init_from=gpt2 --port=8001

The same address speaks the OpenAI API: base_url="http://127.0.0.1:8000/v1". Only programs on this
machine reach it, unless --host says otherwise. It needs an extra: pip install '.[web]'.
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses

from quill import settings
from quill.errors import needs_extra, run_command
from quill.interop.for_sampling import DATASET, INIT_FROM, OUT_DIR
from quill.settings import DType, option
from quill.training.devices import out_of_memory_advice


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    out_dir: str = option(*OUT_DIR)
    init_from: str = option(*INIT_FROM)
    dataset: str = option(*DATASET)
    host: str = option(
        "127.0.0.1",
        "address to listen on; 0.0.0.0: all, then whoever knows this machine's can use it",
    )
    port: int = option(8000, "0: any that is free", min=0, max=65535)
    max_texts: int = option(16, "texts that are written at the same time", min=1, max=1024)
    max_waiting: int = option(48, "texts that wait; above that the answer is 429", min=0)
    max_new_tokens: int = option(4096, "in a text, at most", min=1)
    max_prompt_tokens: int = option(32768, "of which the model reads its block_size", min=1)
    max_seconds: float = option(300.0, "for a text, which then ends", min=0.1)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: DType = option("auto", "dtype of the weights and of matrix products")


def main(argv: list[str]) -> int:
    config = settings.load(ServeConfig, argv, usage=__doc__)
    with needs_extra("web"):
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    from quill.views import server
    from quill.views.served import load

    with server.listen(config.host, config.port) as listener:
        with out_of_memory_advice(f"lower max_texts={config.max_texts}"):
            served = load(config)
        server.run(server.new_server(served, config.host), listener)
    return 0


if __name__ == "__main__":
    run_command(main)

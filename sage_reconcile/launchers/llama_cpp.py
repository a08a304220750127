"""llama-server's own flags in, the real llama.cpp HTTP server of `xllamacpp` out, in this one process.

Interchangeable with a `llama-server` on PATH: same flags, same endpoints, exit code 0 on SIGTERM and SIGINT once it
serves (while it loads, the signal itself ends it), 1 on a mistake. It must not know sage. Flags: https://github.com/ggml-org/llama.cpp/tree/master/tools/server.
"""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# A seed of -1 asks for a new one at every request; llama.cpp writes that as the largest 32-bit number.
_SEED_MASK = 0xFFFFFFFF

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """1. Read the flags. 2. Check what is cheap to check. 3. Load llama.cpp and the model. 4. Serve until a signal."""
    for number in _SIGNALS:
        signal.signal(number, lambda _number, _frame: os._exit(0))
    # 1. An unknown flag must not cost the import of a 100 MB library.
    args = _arguments(words)
    # 2. llama.cpp says both of these too, but among many lines and never last.
    if not Path(args.model).is_file():
        _fail(f"cannot load model {args.model}: no such file")
    _check_port(args.host, args.port)
    # 3. `xllamacpp.Server(...)` holds the GIL until the weights are loaded, minutes for a large model, and a
    # handler in Python waits for the GIL. The kernel's own way to end a process waits for nobody.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    server = _server(args)
    # 4. The server lives on threads of its own, as long as it is kept here.
    _wait_for_signal(server)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(words)
    if unknown:
        _fail(f"invalid argument: {unknown[0]}")
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="llama_cpp", allow_abbrev=False, description="Serve a GGUF model with llama.cpp over HTTP.")
    flag = parser.add_argument
    flag("-m", "--model", required=True, help="the .gguf file")
    flag("-a", "--alias", default="", help="names that clients may ask for, comma-separated")
    flag("--host", default="127.0.0.1")
    flag("--port", type=int, default=8080)
    flag("--api-key", default="", help="keys that clients may present, comma-separated")
    flag("-c", "--ctx-size", type=int, default=0, help="tokens of context over all slots; 0 is the model's own")
    flag("-n", "--predict", "--n-predict", type=int, default=-1, help="most tokens per answer; -1 is no limit")
    flag("-np", "--parallel", type=int, default=-1, help="slots; -1 is four slots that share one context")
    flag("-b", "--batch-size", type=int, default=2048)
    flag("-ub", "--ubatch-size", type=int, default=512)
    flag("-t", "--threads", type=int, default=-1)
    flag("-s", "--seed", type=int, default=-1)
    flag("-ngl", "--gpu-layers", "--n-gpu-layers", type=_gpu_layers, default=-1, help="a number, auto or all")
    flag("-sm", "--split-mode", choices=("none", "layer", "row", "tensor"), default="layer")
    flag("-ts", "--tensor-split", type=_fractions, default=(), help="share of each GPU, such as 3,1")
    flag("-mg", "--main-gpu", type=int, default=0)
    flag("-fa", "--flash-attn", choices=("on", "off", "auto"), default="auto")
    flag("-ctk", "--cache-type-k", choices=_CACHE_TYPES, default="f16")
    flag("-ctv", "--cache-type-v", choices=_CACHE_TYPES, default="f16")
    flag("--mmap", action=argparse.BooleanOptionalAction, default=True)
    flag("--embedding", "--embeddings", action="store_true", help="serve embeddings only")
    flag("--pooling", choices=("none", "mean", "cls", "last", "rank"), help="default: the model's own")
    flag("--rerank", "--reranking", action="store_true", help="serve /v1/rerank only")
    flag("--jinja", action=argparse.BooleanOptionalAction, default=True)
    flag("--chat-template", default="", help="a built-in name or a Jinja template; default: the model's own")
    flag("--metrics", action="store_true", help="answer GET /metrics")
    flag("--webui", "--ui", action=argparse.BooleanOptionalAction, default=True)
    return parser


_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


def _gpu_layers(word: str) -> int:
    """llama.cpp's own numbers: -1 is "as many as fit", -2 is "all of them"."""
    return {"auto": -1, "all": -2}.get(word) or int(word)


def _fractions(word: str) -> tuple[float, ...]:
    return tuple(float(part) for part in word.replace("/", ",").split(","))


def _check_port(host: str, port: int) -> None:
    """Advisory: the server binds for itself a moment later, and its own failure counts too."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        # create_server adds its own words to strerror.
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        _fail(f"cannot listen on {host}:{port}: {why}")
    except OverflowError as error:
        _fail(f"cannot listen on {host}:{port}: {error}")


def _server(args: argparse.Namespace) -> Any:  # xllamacpp has no types
    try:
        import xllamacpp
    except ImportError as error:
        _fail(f"cannot import xllamacpp: {error}; install it with: pip install 'sage-reconcile[cpu]'")
    try:
        return xllamacpp.Server(_params(xllamacpp, args))
    except RuntimeError:
        _fail(f"cannot serve {args.model} on {args.host}:{args.port}: llama.cpp says why in its own lines")


def _params(library: Any, args: argparse.Namespace) -> Any:
    params = library.CommonParams()
    params.model.path = args.model
    params.model_alias = _parts(args.alias)
    params.hostnames = [args.host]
    params.port = args.port
    params.api_keys = sorted(_parts(args.api_key))
    params.endpoint_metrics = args.metrics
    params.ui = args.webui
    params.n_ctx = args.ctx_size
    params.n_predict = args.predict
    params.n_parallel = args.parallel
    params.n_batch = args.batch_size
    params.n_ubatch = args.ubatch_size
    params.cpuparams.n_threads = args.threads
    params.sampling.seed = args.seed & _SEED_MASK
    params.use_jinja = args.jinja
    params.chat_template = args.chat_template
    _set_memory(params, library, args)
    _set_embedding(params, library, args)
    return params


def _set_memory(params: Any, library: Any, args: argparse.Namespace) -> None:
    params.n_gpu_layers = args.gpu_layers
    params.main_gpu = args.main_gpu
    params.split_mode = library.llama_split_mode[f"LLAMA_SPLIT_MODE_{args.split_mode.upper()}"]
    if args.tensor_split:
        # A fixed-size array on the C++ side: GPUs that are not named get nothing.
        params.tensor_split = [*args.tensor_split, *[0.0] * (len(params.tensor_split) - len(args.tensor_split))]
    attention = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}[args.flash_attn]
    params.flash_attn_type = library.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{attention}"]
    params.cache_type_k = library.ggml_type[f"GGML_TYPE_{args.cache_type_k.upper()}"]
    params.cache_type_v = library.ggml_type[f"GGML_TYPE_{args.cache_type_v.upper()}"]
    if not args.mmap:
        params.load_mode = library.llama_load_mode.LLAMA_LOAD_MODE_NONE


def _set_embedding(params: Any, library: Any, args: argparse.Namespace) -> None:
    params.embedding = args.embedding or args.rerank
    pooling = "rank" if args.rerank else args.pooling
    if pooling is not None:
        params.pooling_type = library.llama_pooling_type[f"LLAMA_POOLING_TYPE_{pooling.upper()}"]


def _parts(words: str) -> set[str]:
    return {part.strip() for part in words.split(",") if part.strip()}


def _wait_for_signal(_kept: object) -> NoReturn:
    """Leave with 0 on a signal, whichever thread the kernel gives it to: that thread writes to a pipe."""
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    for number in _SIGNALS:
        signal.signal(number, lambda _number, _frame: None)
    os.read(woken, 1)
    os._exit(0)


def _fail(why: str) -> NoReturn:
    print(f"error: {why}", file=sys.stderr, flush=True)
    # Past the interpreter's own clean-up: a C++ thread that outlives it would turn exit code 1 into a crash.
    os._exit(1)


if __name__ == "__main__":
    main()

"""A random llama in a GGUF file of about 450 KB: real llama.cpp loads it at once, chats garbage and embeds.

    python tests/tiny_gguf.py OUT.gguf

The same seed gives the same bytes. The vocabulary is ASCII only: llama.cpp answers 500 to every request once a model
says a token whose bytes are not UTF-8, and a random model soon says every token it has. It never says its end token
(see _add_weights), so an answer is as long as max_tokens asks.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

_LAYERS = 2
_WIDTH = 64
_FEED_FORWARD = 128
_HEADS = 2
_KV_HEADS = 1
_CONTEXT = 2048
_VOCABULARY = 320

_CONTROL = {"<unk>": gguf.TokenType.UNKNOWN, "<s>": gguf.TokenType.CONTROL, "</s>": gguf.TokenType.CONTROL}

_CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def write_tiny_gguf(path: Path, *, embedding: bool = False, seed: int = 0) -> None:
    """Write a model that serves chat, and embeddings of 64 numbers under `--embedding --pooling mean`.

    embedding: the file itself asks for mean pooling, so that `--embedding` alone is enough.
    """
    writer = gguf.GGUFWriter(path, "llama")
    _add_shape(writer)
    if embedding:
        writer.add_pooling_type(gguf.PoolingType.MEAN)
    _add_tokenizer(writer)
    _add_weights(writer, np.random.default_rng(seed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter) -> None:
    writer.add_name("tiny")
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = _tokens()
    assert len(tokens) == _VOCABULARY
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    # Longer tokens first: SentencePiece joins the pair with the best score.
    writer.add_token_scores([float(len(token)) for token in tokens])
    writer.add_token_types([*_CONTROL.values(), *[gguf.TokenType.NORMAL] * (_VOCABULARY - len(_CONTROL))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(_CHAT_TEMPLATE)


def _tokens() -> list[str]:
    """The control tokens, every printable ASCII character, then pairs of letters up to the vocabulary's size."""
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    # U+2581 is how SentencePiece writes a space: llama.cpp turns it back into one.
    characters = ["\u2581", "\n", *[chr(code) for code in range(33, 127)]]
    pairs = [first + second for first in letters for second in letters]
    return [*_CONTROL, *characters, *pairs][:_VOCABULARY]


def _add_weights(writer: gguf.GGUFWriter, random: np.random.Generator) -> None:
    def matrix(name: str, rows: int, columns: int, *, silent_rows: int = 0) -> None:
        weights = (random.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)
        weights[:silent_rows] = 0
        writer.add_tensor(name, weights)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(_WIDTH, dtype=np.float32))

    kv_width = _WIDTH // _HEADS * _KV_HEADS
    matrix("token_embd.weight", _VOCABULARY, _WIDTH)
    for layer in range(_LAYERS):
        norm(f"blk.{layer}.attn_norm.weight")
        matrix(f"blk.{layer}.attn_q.weight", _WIDTH, _WIDTH)
        matrix(f"blk.{layer}.attn_k.weight", kv_width, _WIDTH)
        matrix(f"blk.{layer}.attn_v.weight", kv_width, _WIDTH)
        matrix(f"blk.{layer}.attn_output.weight", _WIDTH, _WIDTH)
        norm(f"blk.{layer}.ffn_norm.weight")
        matrix(f"blk.{layer}.ffn_gate.weight", _FEED_FORWARD, _WIDTH)
        matrix(f"blk.{layer}.ffn_up.weight", _FEED_FORWARD, _WIDTH)
        matrix(f"blk.{layer}.ffn_down.weight", _WIDTH, _FEED_FORWARD)
    norm("output_norm.weight")
    # A control token always scores 0, the middle of the field: never among the 40 best that llama.cpp draws from.
    matrix("output.weight", _VOCABULARY, _WIDTH, silent_rows=len(_CONTROL))


if __name__ == "__main__":
    write_tiny_gguf(Path(sys.argv[1]))

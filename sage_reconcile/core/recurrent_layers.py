"""Layers whose memory of a text does not grow with it: what they hold, and the state that they keep for a sequence.

Which of the kinds a model has follows from the keys that its config has for it.
"""

from sage_reconcile.core.config_keys import Keys
from sage_reconcile.core.shape import StateCache


def recurrent_numbers(keys: Keys) -> int:
    """The numbers in one such layer."""
    if keys.whole("linear_num_value_heads"):
        return _delta_net(keys)
    if keys.below("linear_attn_config").values:
        return _kimi_delta_attention(keys)
    if keys.whole("mamba_num_heads", "mamba_n_heads"):
        return _mamba_2(keys)
    if _state_size(keys):
        return _mamba_1(keys)
    if keys.whole("conv_L_cache"):
        return keys.hidden * (4 * keys.hidden + keys.whole("conv_L_cache"))
    # Lightning attention: queries, keys, values and a gate of the output in, and the way out.
    return 5 * keys.hidden * keys.heads * _head_size(keys)


def recurrent_state(keys: Keys) -> StateCache:
    """What one such layer keeps of a sequence; types are those of vLLM's MambaStateDtypeCalculator, unless told."""
    number_bytes = 4 if keys.text("mamba_ssm_dtype", "mamba_ssm_cache_dtype") == "float32" else 2
    if keys.whole("linear_num_value_heads"):
        key, value = keys.whole("linear_key_head_dim"), keys.whole("linear_value_head_dim")
        heads = keys.whole("linear_num_value_heads")
        mixed = 2 * keys.whole("linear_num_key_heads") * key + heads * value
        return _state(mixed, keys.whole("linear_conv_kernel_dim", default=4), heads * key * value, number_bytes)
    kimi = keys.below("linear_attn_config")
    if kimi.values:
        heads, size = kimi.whole("num_heads"), kimi.whole("head_dim")
        return _state(3 * heads * size, kimi.whole("short_conv_kernel_size", default=4), heads * size**2, 4)
    kernel = keys.whole("conv_kernel", "mamba_d_conv", default=4)
    if keys.whole("mamba_num_heads", "mamba_n_heads"):
        inner, mixed = _mamba_2_widths(keys)
        return _state(mixed, kernel, inner * _state_size(keys), number_bytes)
    if _state_size(keys):
        inner = _mamba_1_width(keys)
        return _state(inner, kernel, inner * _state_size(keys), number_bytes)
    if keys.whole("conv_L_cache"):
        return _state(keys.hidden, keys.whole("conv_L_cache"), 0, 2)
    return _state(0, 1, keys.heads * _head_size(keys) ** 2, 2)


def _state(mixed: int, kernel: int, numbers: int, number_bytes: int) -> StateCache:
    return StateCache(
        convolution_numbers=mixed * max(0, kernel - 1), state_numbers=numbers, state_number_bytes=number_bytes
    )


def _delta_net(keys: Keys) -> int:
    """Gated delta net: queries, keys, values, gates and decays in, a convolution, and the way out."""
    key = keys.whole("linear_num_key_heads") * keys.whole("linear_key_head_dim")
    heads = keys.whole("linear_num_value_heads")
    value = heads * keys.whole("linear_value_head_dim")
    kernel = keys.whole("linear_conv_kernel_dim", default=4)
    return keys.hidden * (2 * key + 2 * value + 2 * heads) + (2 * key + value) * kernel + value * keys.hidden


def _kimi_delta_attention(keys: Keys) -> int:
    """Queries, keys, values and the way out, two narrow gates, and three convolutions."""
    kimi = keys.below("linear_attn_config")
    heads, size = kimi.whole("num_heads"), kimi.whole("head_dim")
    inner = heads * size
    gates = 2 * size * (keys.hidden + inner) + keys.hidden * heads
    return 4 * keys.hidden * inner + gates + 3 * inner * kimi.whole("short_conv_kernel_size", default=4)


def _mamba_2(keys: Keys) -> int:
    inner, mixed = _mamba_2_widths(keys)
    heads = keys.whole("mamba_num_heads", "mamba_n_heads")
    # The convolution has a bias; each head a decay, a step and a skip; the output a norm.
    kernel = keys.whole("conv_kernel", "mamba_d_conv", default=4) + 1
    return keys.hidden * (inner + mixed + heads) + mixed * kernel + 3 * heads + inner + inner * keys.hidden


def _mamba_2_widths(keys: Keys) -> tuple[int, int]:
    """Of the inside, and of what passes through the convolution."""
    heads, size = keys.whole("mamba_num_heads", "mamba_n_heads"), keys.whole("mamba_head_dim", "mamba_d_head")
    inner = heads * size if size else keys.whole("mamba_d_ssm") or keys.whole("mamba_expand", "expand") * keys.hidden
    return inner, inner + 2 * keys.whole("n_groups", "mamba_n_groups") * _state_size(keys)


def _mamba_1(keys: Keys) -> int:
    """The way in, a convolution, what selects (step, input and output), the decays, and the way out."""
    inner, state = _mamba_1_width(keys), _state_size(keys)
    # "auto": a sixteenth of the model's width.
    rank = keys.whole("mamba_dt_rank", "time_step_rank") or -(-keys.hidden // 16)
    kernel = keys.whole("conv_kernel", "mamba_d_conv", default=4)
    selecting = inner * (rank + 2 * state) + rank * inner + inner
    return keys.hidden * 2 * inner + inner * (kernel + 1) + selecting + inner * (state + 1) + inner * keys.hidden


def _mamba_1_width(keys: Keys) -> int:
    return keys.whole("mamba_expand", "expand", default=2) * keys.hidden


def _state_size(keys: Keys) -> int:
    return keys.whole("ssm_state_size", "mamba_d_state", "state_size")


def _head_size(keys: Keys) -> int:
    return keys.whole("head_dim") or (keys.hidden // keys.heads if keys.heads else 0)

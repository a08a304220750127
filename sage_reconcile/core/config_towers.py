"""How many numbers the towers of a model hold that turn images and sound into tokens, counted from its config."""

import re
from collections.abc import Mapping
from typing import Any

from sage_reconcile.core.config_dialects import tower_keys
from sage_reconcile.core.config_keys import Keys

_GATED_TOWERS = frozenset({"qwen2_5_vl", "qwen2_5_omni_vision_encoder", "pixtral", "gemma4_vision"})
# A tower that timm made tells its size by its name: mobilenetv5_300m_enc.
_NAMED_MILLIONS = re.compile(r"_(\d{1,4})m(?:_|$)", re.ASCII)


def tower_numbers(config: Mapping[str, Any], keys: Keys) -> int:
    """The towers for images and sound, and what joins them to the text model."""
    vision, audio = tower_keys(config)
    total = 0
    width = vision_width(vision)
    if width:
        depth = vision.whole("depth", "num_hidden_layers", "layers") + vision.whole("num_global_layers")
        layer = config.get("vision_feature_layer")
        if isinstance(layer, int) and -depth <= layer < -1:
            # llava takes the output of the last layer but one, and leaves out the last.
            depth += 1 + layer
        inner = vision.whole("intermediate_size") or int(vision.fraction("mlp_ratio", 4.0) * width)
        matrices = 3 if vision.family in _GATED_TOWERS or keys.family.startswith("qwen2_5_vl") else 2
        total += depth * (4 * width**2 + matrices * width * inner) + _tiles(vision, width)
        total += _joint(vision, keys, width, Keys(values=config).fraction("downsample_ratio", 1.0))
    named = _NAMED_MILLIONS.search(vision.text("architecture"))
    total = int(named[1]) * 10**6 if named is not None else total
    sound = audio.whole("d_model", "hidden_size")
    blocks = audio.whole("conf_num_hidden_layers")
    if sound and blocks:
        # A conformer: two feed-forwards of four times the width, attention with positions, and a gated convolution.
        total += blocks * 24 * sound**2
    elif sound:
        depth = audio.whole("encoder_layers", "num_hidden_layers")
        total += depth * (
            4 * sound**2 + 2 * sound * audio.whole("encoder_ffn_dim", "intermediate_size", default=4 * sound)
        )
    return total


def vision_width(vision: Keys) -> int:
    return vision.whole("embed_dim", "hidden_size", "width")


def _tiles(vision: Keys, width: int) -> int:
    """Llama 3.2 Vision: a position for each patch of each tile of each shape that an image may have."""
    if vision.family != "mllama_vision_model":
        return 0
    patches = (vision.whole("image_size") // max(1, vision.whole("patch_size", default=14))) ** 2 + 1
    shapes = len(vision.entries("supported_aspect_ratios")) or 8
    return (shapes + 1) * vision.whole("max_num_tiles") * patches * width


def _joint(vision: Keys, keys: Keys, width: int, downsampled: float) -> int:
    """The patches' embedding and the projector: Qwen merges 2 x 2 patches, the others take each as it is."""
    patches = 3 * vision.whole("patch_size", default=14) ** 2 * vision.whole("temporal_patch_size", default=1) * width
    merge = vision.whole("spatial_merge_size")
    if merge and merge <= 8:
        wide = width * merge**2
        mergers = 1 + len(vision.entries("deepstack_visual_indexes"))
        return patches + mergers * (wide**2 + wide * keys.hidden)
    # InternVL: so many patches become one.
    out = vision.whole("vision_output_dim") or round(width / max(downsampled, 0.05) ** 2)
    return patches + out * keys.hidden + (keys.hidden**2 if not vision.whole("vision_output_dim") else 0)

"""Names of published vision transformers' weights: Hugging Face's, the authors' and timm's.

The project's own names are timm's. Others are renamed, and what is stored in other pieces is joined
or split: queries, keys and values, the two halves of SwiGLU, positions.
"""

from collections.abc import Mapping
import re

import numpy as np

from rll_jax.networks._stages import renamed

# The kernel of the patches, by which a vision tower is found in a larger file.
_PATCH_KERNELS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embedding.weight",
    "embeddings.patch_embeddings.weight",
)
# Parts of names to replace, in this order. First Hugging Face's, of files and of transformers 5.
_TO_TIMM = [
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^(?:(?:embeddings\.)?register_tokens|storage_tokens)$", "reg_token"),
    (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(?:projection\.)?", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(?:layernorm|post_layernorm)\.", "norm."),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.(?=attention|layernorm|mlp)", "attn_pool."),
    (r"(?<=^attn_pool\.)layernorm\.", "norm."),
    (r"(?<=^attn_pool\.)attention\.out_proj\.", "proj."),
    (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(?:layer_scale([12])\.lambda1|gamma_([12]))$", r".ls\1\2.gamma"),
    (r"\.(?:attention\.attention\.|attention\.|self_attn\.)(query|key|value)\.", r".attn.\1."),
    (r"\.(?:attention|self_attn)\.([qkv])_proj\.", r".attn.\1_proj."),
    (r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(?<=\d)\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.(?:weights_in|w12)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:weights_out|down_proj|w3)\.", ".mlp.fc2."),
    (r"\.mlp\.(?:w1|fc1_g)\.", ".mlp.gate_proj."),
    (r"\.mlp\.(?:w2|fc1_x)\.", ".mlp.up_proj."),
    (r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias"),
]
# Parts of timm's names to replace for each of Hugging Face's families of names.
_TO_HUGGINGFACE = {
    "vit": [
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ],
    "dinov2": [
        (r"^(cls_token|mask_token)$", r"embeddings.\1"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    ],
    "dinov3": [
        (r"^(cls_token|mask_token)$", r"embeddings.\1"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"^blocks\.", "layer."),
        (r"\.attn\.(q|k|v)[a-z]+\.", r".attention.\1_proj."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.mlp\.fc1\.", ".mlp.up_proj."),
        (r"\.mlp\.fc2\.", ".mlp.down_proj."),
        (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    ],
    "clip": [
        (r"^cls_token$", "vision_model.embeddings.class_embedding"),
        (r"^pos_embed$", "vision_model.embeddings.position_embedding.weight"),
        (r"^patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (r"^norm_pre\.", "vision_model.pre_layrnorm."),
        (r"^norm\.", "vision_model.post_layernorm."),
        (r"^attn_pool\.latent$", "vision_model.head.probe"),
        (r"^attn_pool\.in_proj_", "vision_model.head.attention.in_proj_"),
        (r"^attn_pool\.proj\.", "vision_model.head.attention.out_proj."),
        (r"^attn_pool\.norm\.", "vision_model.head.layernorm."),
        (r"^attn_pool\.", "vision_model.head."),
        (r"^blocks\.", "vision_model.encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"\.attn\.(q|k|v)[a-z]+\.", r".self_attn.\1_proj."),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
    ],
}
_SWIGLU_TO_HUGGINGFACE = [
    (r"\.mlp\.fc1\.", ".mlp.weights_in."),
    (r"\.mlp\.fc2\.", ".mlp.weights_out."),
]
# What is joined, along the first axis: the parts' names, in their order, and the name of the whole.
_JOINED = [
    (("attn.query", "attn.key", "attn.value"), "attn.qkv"),
    (("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attn.qkv"),
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.fc1"),
]
_IGNORED = re.compile(
    r"mask_token$|pooler\.dense\.|embeddings\.position_ids$|rope\w*\.|.*\.bias_mask$"
)


def to_timm(arrays: Mapping[str, np.ndarray], *, rotary: bool = False) -> dict[str, np.ndarray]:
    """Returns a vision transformer's arrays under timm's names and in its pieces.

    A tower in a larger file is found by the kernel of its patches; of a student and a teacher the
    teacher is taken. What stands beside it, such as a text tower, is left out; and so are poolers,
    mask tokens, and what DINOv3's files have for its turns. Arrays that are no vision transformer's
    stay as they are.

    Args:
      arrays: {name: array} in PyTorch's layout, under timm's or Hugging Face's names or those of
        the files that the authors of DINO, DINOv2 and DINOv3 published.
      rotary: whether they are DINOv3's: the biases of queries and values may be missing, and those
        of the keys are 0.

    Raises:
      ValueError: there are several towers; or keys have biases, and DINOv3's have none.
    """
    named = renamed(_tower(arrays), _TO_TIMM)
    named = {name: x for name, x in named.items() if not _IGNORED.match(name)}
    if rotary:
        _add_key_biases(named)
    for parts, whole in _JOINED:
        _join(named, parts, whole)
    # Hugging Face's name of an MLP's first layer in a DINOv3 without gates.
    named = renamed(named, [(r"\.mlp\.up_proj\.", ".mlp.fc1.")])
    if rotary:
        _clear_key_biases(named)
    _split_pool(named)
    for name in ("cls_token", "pos_embed"):
        if name in named and named[name].ndim < 3:
            named[name] = named[name].reshape(1, -1, named[name].shape[-1])
    _place_beside_registers(named)
    return named


def to_huggingface(arrays: Mapping[str, np.ndarray], swiglu: bool) -> dict[str, np.ndarray]:
    """Returns arrays under timm's names under those of Hugging Face's published files.

    They are the names of CLIP and SigLIP where there is a norm before the blocks or an attention
    pool, of DINOv3 where there are no positions, of DINOv2 where there are layer scales, and of ViT
    otherwise.

    Args:
      arrays: {name: array}, as `to_timm` returns them. Heads may be among them.
      swiglu: whether the MLPs are SwiGLU.
    """
    family, named = _family(arrays), dict(arrays)
    _tokens_as_published(named, family)
    for name in [name for name in named if ".attn.qkv." in name]:
        thirds = np.split(named.pop(name), 3)
        for part, array in zip(("query", "key", "value"), thirds, strict=True):
            named[name.replace("qkv", part)] = array
    for kind in ("weight", "bias"):
        if f"attn_pool.q.{kind}" in named:
            pieces = [named.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
            named[f"attn_pool.in_proj_{kind}"] = np.concatenate(pieces)
    patterns = _TO_HUGGINGFACE[family]
    if family == "dinov3":
        named = _pieces_of_dinov3(named, swiglu)
    elif swiglu:
        patterns = [*patterns, *_SWIGLU_TO_HUGGINGFACE]
    return renamed(named, patterns)


def _family(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns which of Hugging Face's families of names arrays under timm's names belong to."""
    if any(name.startswith(("norm_pre.", "attn_pool.")) for name in arrays):
        return "clip"
    if "pos_embed" not in arrays:
        return "dinov3"
    return "dinov2" if any(name.endswith(".ls1.gamma") for name in arrays) else "vit"


def _tokens_as_published(named: dict[str, np.ndarray], family: str) -> None:
    """Gives tokens and positions the shapes of a family, in place; adds the mask token."""
    if family == "clip":
        for name in {"cls_token", "pos_embed"} & named.keys():
            named[name] = named[name][0]
        if "cls_token" in named:
            named["cls_token"] = named["cls_token"][0]
    elif family == "dinov2":
        named["mask_token"] = np.zeros_like(named["cls_token"][0])
        if "reg_token" in named:  # the class token holds its position
            nowhere = np.zeros_like(named["cls_token"])
            named["pos_embed"] = np.concatenate([nowhere, named["pos_embed"]], axis=1)
    elif family == "dinov3":
        named["mask_token"] = np.zeros_like(named["cls_token"])


def _pieces_of_dinov3(named: Mapping[str, np.ndarray], swiglu: bool) -> dict[str, np.ndarray]:
    """Returns arrays without the keys' biases, which are 0, and with SwiGLU in two pieces."""
    pieces = {name: x for name, x in named.items() if not name.endswith(".attn.key.bias")}
    for name in [name for name in pieces if swiglu and ".mlp.fc1." in name]:
        for part, array in zip(("gate_proj", "fc1"), np.split(pieces.pop(name), 2), strict=True):
            pieces[name.replace("fc1", part)] = array
    return pieces


def _tower(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays of the vision tower without the prefix of their names."""
    prefixes = {
        name.removesuffix(kernel)
        for name in arrays
        for kernel in _PATCH_KERNELS
        if name == kernel or name.endswith(f".{kernel}")
    }
    evaluated = {prefix for prefix in prefixes if {"teacher", "ema"} & set(prefix.split("."))}
    prefixes = evaluated if len(evaluated) == 1 else prefixes
    if len(prefixes) > 1:
        raise ValueError(
            f"the weights hold {len(prefixes)} vision transformers "
            f"({', '.join(sorted(prefixes))}): save one of them alone"
        )
    prefix = prefixes.pop() if prefixes else ""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def _add_key_biases(named: dict[str, np.ndarray]) -> None:
    """Adds biases of 0 to the keys, in place, where queries have some and keys have not."""
    for name in [name for name in named if name.endswith(".attn.q_proj.bias")]:
        key = name.replace("q_proj", "k_proj")
        if np.any(named.setdefault(key, np.zeros_like(named[name]))):
            raise ValueError(f"{key} is not 0: the keys of a DINOv3 have no bias")


def _clear_key_biases(named: dict[str, np.ndarray]) -> None:
    """Makes the keys' biases 0, in place: a mask hides them. Without any biases all are 0."""
    for name in [name for name in named if name.endswith(".attn.qkv.weight")]:
        key = name.removesuffix("weight") + "bias"
        bias = named.get(key, np.zeros(len(named[name]), named[name].dtype)).copy()
        bias[len(bias) // 3 : 2 * len(bias) // 3] = 0
        named[key] = bias


def _join(named: dict[str, np.ndarray], parts: tuple[str, ...], whole: str) -> None:
    """Joins arrays of each block, in place, where all parts are there."""
    for name in list(named):
        if f".{parts[0]}." in name:
            names = [name.replace(parts[0], part) for part in parts]
            if all(part in named for part in names):
                joined = np.concatenate([named.pop(part) for part in names])
                named[name.replace(parts[0], whole)] = joined


def _split_pool(named: dict[str, np.ndarray]) -> None:
    """Splits the input layer of SigLIP's attention pool into that of the query and of the rest."""
    for kind in ("weight", "bias"):
        whole = named.pop(f"attn_pool.attention.in_proj_{kind}", None)
        if whole is not None:
            width = len(whole) // 3
            named[f"attn_pool.q.{kind}"], named[f"attn_pool.kv.{kind}"] = (
                whole[:width],
                whole[width:],
            )


def _place_beside_registers(named: dict[str, np.ndarray]) -> None:
    """Adds the class token's position to the token, where there are registers, as timm has it."""
    if not {"reg_token", "cls_token", "pos_embed"} <= named.keys():
        return
    positions = named["pos_embed"]
    if positions.shape[1] > 1 and _is_square(positions.shape[1] - 1):
        named["cls_token"] = named["cls_token"] + positions[:, :1]
        named["pos_embed"] = positions[:, 1:]


def _is_square(count: int) -> bool:
    return round(count**0.5) ** 2 == count


def pixels_of(name: str) -> str | None:
    """Returns which of `backbones.PIXELS` published weights expect, or None if that is not known.

    Args:
      name: a name of the Hugging Face hub, or of a file: timm/vit_small_patch16_224.dino.
    """
    for pattern, pixels in (
        ("sat493m", "satellite"),
        ("siglip", "half"),
        ("clip", "clip"),
        ("dino|deit|mae", "imagenet"),
        ("augreg|in21k|google/vit|google-vit", "half"),
    ):
        if re.search(rf"(?<![a-z])(?:{pattern})", name.lower()):
            return pixels
    return None


def is_timms(name: str) -> bool:
    """Returns whether a name of weights is one of timm's: vit_base_patch16_224.augreg_in21k."""
    return re.search(r"(?<![a-z0-9])vit_\w+_patch\d+_", name.lower()) is not None

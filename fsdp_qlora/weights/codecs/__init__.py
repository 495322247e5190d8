"""Codecs: how a frozen weight becomes bytes and back."""

from fsdp_qlora.weights.codecs.base import Codec, CodecOf, Decoder, FewRowsCodec, Parts
from fsdp_qlora.weights.codecs.finite import NotFinite, all_finite
from fsdp_qlora.weights.codecs.hqq import HQQ, check_groups
from fsdp_qlora.weights.codecs.nf4 import NF4
from fsdp_qlora.weights.codecs.plain import Plain
from fsdp_qlora.weights.codecs.table import (
    choose_codec,
    codec_named,
    companions,
    companions_in,
    described,
    is_quantized,
    published_by,
    stored_codec,
    telling,
    train_type_over,
    weight_of,
)

__all__ = [
    "HQQ",
    "NF4",
    "Codec",
    "CodecOf",
    "Decoder",
    "FewRowsCodec",
    "NotFinite",
    "Parts",
    "Plain",
    "all_finite",
    "check_groups",
    "choose_codec",
    "codec_named",
    "companions",
    "companions_in",
    "described",
    "is_quantized",
    "published_by",
    "stored_codec",
    "telling",
    "train_type_over",
    "weight_of",
]

"""What encodes a base: a device and the packages in use, for cards and versions may make other bits of one weight."""

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from fsdp_qlora.weights.codecs import Codec

VERSION = 1  # of encoders and layouts; counts up where one makes other bytes of the same options
DEVICE = "device"


def encoders_of(codecs: Iterable[Codec], device: torch.device) -> dict[str, str]:
    """Return the name of the device and the versions of what encodes these codecs on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    packages = sorted({codec.encoder for codec in codecs} - {""})
    return {
        DEVICE: name,
        "fsdp_qlora": str(VERSION),
        "torch": str(torch.__version__),
        **{package: _version(package) for package in packages},
    }


def merged(ranks: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the encoders of a run from those of its ranks: of unlike ones, all names. They share the units among them,
    so such a base is neither one's alone."""
    found = list(ranks)
    return {key: " + ".join(sorted({encoders.get(key, "") for encoders in found})) for key in found[0]}


def are_older(these: Mapping[str, str], those: Mapping[str, str]) -> bool:
    """Return whether `these` are the same device with the same packages as `those`, none newer and one older."""
    if these.keys() != those.keys() or these.get(DEVICE) != those.get(DEVICE):
        return False
    pairs = [(_numbers(these[key]), _numbers(those[key])) for key in these if key != DEVICE]
    return all(one <= other for one, other in pairs) and any(one < other for one, other in pairs)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

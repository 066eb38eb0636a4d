"""Integer deployment: the weights of a finished model as small integers and scales. Imports no framework.

    q = quantize(weight, bits=8)             int8 codes, and a scale for each output channel
    q = quantize(weight, bits=4, group=64)   codes of 4 bits, and a scale for every 64 of a row
    dequantize(q)                            the floats that they stand for
    save_file(path, {"h.0.w": q, ...})       in a `.tri` file, entropy-coded; load_file(path) gives the dict again

A model is chosen by name to become so: nothing here is lossless, and nothing here is done unasked.
"""

from tricomp.integers.deployment import quantize_file
from tricomp.integers.device import dequantize_on_device, quantize_on_device
from tricomp.integers.exchange import quantization_config, to_safetensors
from tricomp.integers.exchange_reader import from_safetensors
from tricomp.integers.files import load_file, save_file
from tricomp.integers.packing import pack_int4, unpack_int4
from tricomp.integers.quantized import Quantized, dequantize, quantize

__all__ = [
    "Quantized",
    "dequantize",
    "dequantize_on_device",
    "from_safetensors",
    "load_file",
    "pack_int4",
    "quantization_config",
    "quantize",
    "quantize_file",
    "quantize_on_device",
    "save_file",
    "to_safetensors",
    "unpack_int4",
]

"""One JAX array to one leaf of the core's tree and back, bit for bit. Imports jax, numpy and the core's ground.

An array on the CPU or a TPU crosses as the numpy array that jax itself gives, which on the CPU shares its memory. One
on a GPU stays there, as a DeviceArray by DLPack, and is compressed where it is. The hard thing: what numpy, the format
or DLPack do not know (typed random keys, int4 and its like, float8) crosses in a dtype that they do know, with a note
of what it was; and jax without jax_enable_x64 would cut 64-bit numbers to 32 without an error, so it never gets them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import ml_dtypes
import numpy as np

from tricomp import codec, dtypes
from tricomp.errors import CorruptFile, TricompError, UnsupportedDtype, UnsupportedNode
from tricomp.layout import DeviceArray
from tricomp_jax.parts import Divided

Array = np.ndarray[Any, Any]
Leaf = Any  # an Array or a DeviceArray; of a file, also a Divided

_log = logging.getLogger("tricomp")

# Dtypes narrower than a byte, by name: what they are stored as. jax and numpy hold them in a byte each as well.
_INTEGER_CARRIERS = {"int2": "int8", "int4": "int8", "uint2": "uint8", "uint4": "uint8"}
_FLOAT_BITS = {"float4_e2m1fn": 4, "float6_e2m3fn": 6, "float6_e3m2fn": 6}
NARROW = (*_INTEGER_CARRIERS, *_FLOAT_BITS)
"""Names of the dtypes that are stored as another and noted."""
CONFIG: Any = jax.config
"""jax's settings, whose names jax makes at run time."""
_GPUS = ("gpu", "cuda", "rocm")
_NOT_IN_DLPACK = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def is_key(value: Any) -> bool:
    """Whether something with a dtype holds typed random keys (jax.random.key)."""
    return _is_of_keys(value.dtype)


@cache
def _is_of_keys(dtype: Any) -> bool:
    return bool(jax.numpy.issubdtype(dtype, jax.dtypes.prng_key))


def key_implementation(keys: jax.Array) -> str:
    """The name of the random generator that typed keys belong to."""
    return str(jax.random.key_impl(keys))


@cache
def name_of(dtype: Any) -> str:
    """The name of a dtype, which numpy puts together anew each time."""
    return str(dtype.name)


@cache
def key_shape(implementation: str) -> tuple[int, ...]:
    """The shape of one key's data. Raises CorruptFile if there is no such generator here."""
    try:
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=implementation)))
    except ValueError:
        raise CorruptFile(
            f"random keys are noted to be of {implementation!r}, which is no generator of this jax. "
            "Register it first, or read the file with tricomp.load."
        ) from None
    shape: tuple[int, ...] = key.shape
    return shape


@cache
def key_dtype(implementation: str) -> Any:
    """The dtype of keys of a generator."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=implementation)).dtype


def to_leaf(value: jax.Array, path: str) -> Leaf:
    """The leaf of an array that is no random key, sharing its memory where it can.

    Raises UnsupportedNode, naming the path, for arrays without readable data here; UnsupportedDtype.
    """
    require_data(value, path)
    name = name_of(value.dtype)
    if name not in dtypes.NAMES and name not in NARROW:
        raise UnsupportedDtype(f"leaf {path!r}: the dtype {name!r} cannot be stored. Convert it, or leave it out.")
    if not value.is_fully_addressable:
        require_readable(value, path)  # a whole copy is here
        value = value.addressable_data(0)
    if is_on_gpu(value):
        try:
            return device_array(value)
        except (ImportError, TricompError, RuntimeError, TypeError, ValueError, BufferError) as error:
            _warn_of_host(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return narrowed(np.asarray(value))


@cache
def _warn_of_host(why: str) -> None:
    _log.warning("arrays on the GPU are copied to the host and compressed there: torch does not take them: %s", why)


def require_data(value: Any, path: str) -> None:
    """Raise UnsupportedNode, naming the path, unless an array has data, here or elsewhere."""
    if isinstance(value, jax.core.Tracer):
        raise UnsupportedNode(
            f"leaf {path!r}: it is traced by jax.jit or the like and has no data yet. Save outside of jit, "
            "or use tricomp_jax.save_every."
        )
    if value.is_deleted():
        raise UnsupportedNode(
            f"leaf {path!r}: its memory was given away, as jit's donate_argnums does. Save what the call returned."
        )


def require_readable(value: Any, path: str) -> None:
    """Raise UnsupportedNode, naming the path, unless all of an array's data can be read by this process."""
    require_data(value, path)
    if not value.is_fully_addressable and not value.is_fully_replicated:
        raise UnsupportedNode(
            f"leaf {path!r}: parts of it are on devices of other processes ({value.sharding}). "
            "Save it with tricomp_jax.CheckpointHook in every process, each of which writes its own parts."
        )


def is_on_gpu(value: jax.Array) -> bool:
    """Whether an array is in the memory of one GPU."""
    devices = value.devices()
    return len(devices) == 1 and next(iter(devices)).platform in _GPUS


def device_array(value: jax.Array) -> DeviceArray:
    """The DeviceArray of an array of a single device, by DLPack: nothing is copied to the host.

    DLPack shares memory; dtypes that it or torch does not know are copied once where they are.
    """
    name, shape = value.dtype.name, tuple(value.shape)
    dtype = dtypes.by_name("uint8" if name in _FLOAT_BITS else _INTEGER_CARRIERS.get(name, name))
    if name in _FLOAT_BITS:
        value = jax.lax.bitcast_convert_type(value, f"uint{_FLOAT_BITS[name]}").astype("uint8")
    elif name in _INTEGER_CARRIERS:
        value = value.astype(dtype.name)
    elif name == "bool":
        value = value.astype("uint8")
    elif name.startswith("float8"):
        value = jax.lax.bitcast_convert_type(value, _NOT_IN_DLPACK[value.dtype.itemsize])
    return DeviceArray(dtype, shape, codec.from_dlpack(value).words)


def narrowed(array: Array) -> Array:
    """An array in a dtype of the format: itself, or one narrower than a byte as bytes."""
    name = name_of(array.dtype)
    if name in _INTEGER_CARRIERS:
        return array.astype(_INTEGER_CARRIERS[name])
    return array.view(np.uint8) if name in _FLOAT_BITS else array


def widened(array: Array, name: str, path: str) -> Array:
    """What `narrowed` was given, of the noted dtype. Raises CorruptFile if the values are none of that dtype."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    is_float = name in _FLOAT_BITS
    if array.dtype.name == ("uint8" if is_float else _INTEGER_CARRIERS[name]):
        found: Array = array.view(dtype) if is_float else array.astype(dtype)
        if not (array >> _FLOAT_BITS[name]).any() if is_float else np.array_equal(found.astype(array.dtype), array):
            return found
    raise CorruptFile(f"leaf {path!r} is noted as {name}, but holds other {array.dtype.name}s. Use tricomp.load.")


def to_host(leaf: Leaf) -> Array:
    """The numpy array of a leaf, copied from its device if it is on one, or put together of its parts."""
    if isinstance(leaf, Divided):
        return leaf.whole()
    array: Array = leaf.words.cpu().numpy().view(leaf.dtype.numpy) if isinstance(leaf, DeviceArray) else leaf
    return array.reshape(leaf.shape)


def from_device_array(leaf: DeviceArray) -> jax.Array:
    """The array of a DeviceArray, on its device, by DLPack."""
    words: jax.Array = jax.dlpack.from_dlpack(leaf.words)
    dtype = leaf.dtype
    if dtype.name == "bool":
        return words.astype(bool).reshape(leaf.shape)
    if dtype.words_per_element == 2:
        parts = jax.lax.bitcast_convert_type(words, f"float{dtype.word_bits}").reshape(*leaf.shape, 2)
        return jax.lax.complex(parts[..., 0], parts[..., 1])
    array: jax.Array = jax.lax.bitcast_convert_type(words, dtype.name)
    return array.reshape(leaf.shape)


def is_weak(value: Any) -> bool:
    """Whether an array, or the shape of one, is a number that takes on the dtype of what it is combined with.

    jax makes such of Python's numbers. To lose that would change what later steps compute.
    """
    return bool(getattr(value, "weak_type", False)) and value.shape == ()


def weakened(value: jax.Array, sharding: Any = None) -> jax.Array:
    """The same number, weakly typed; as it is where jax would make another number or dtype of it."""
    host = np.asarray(value)
    weak = jax.numpy.asarray(host[()].item())
    if not weak.weak_type or weak.dtype != host.dtype or np.asarray(weak).tobytes() != host.tobytes():
        return value
    return weak if sharding is None else jax.device_put(weak, sharding)


def holds(name: str) -> bool:
    """Whether jax arrays can be of a dtype, as jax is set now."""
    return bool(CONFIG.jax_enable_x64) or name not in ("float64", "int64", "uint64", "complex128")


def to_array(leaf: Leaf, sharding: Any = None) -> jax.Array:
    """The jax array of a leaf whose dtype jax holds: on the sharding, else where jax puts what is not committed."""
    if isinstance(leaf, Divided):
        if sharding is not None:
            return _laid(leaf.shape, leaf.dtype, sharding, leaf.box)
        leaf = leaf.whole()
    if isinstance(leaf, DeviceArray):
        leaf = from_device_array(leaf)
    if sharding is None or sharding.is_fully_addressable:
        array: jax.Array = jax.device_put(leaf, sharding)
        return array
    host = np.asarray(leaf)
    return _laid(host.shape, host.dtype, sharding, lambda index: host[index])


def _laid(shape: tuple[int, ...], dtype: Any, sharding: Any, box: Callable[[Any], Array]) -> jax.Array:
    """The array over the devices of a sharding. box: gives what is at an index."""
    known = {} if sharding.addressable_devices else {"dtype": dtype}  # which older versions of jax do not take
    return jax.make_array_from_callback(shape, sharding, box, **known)

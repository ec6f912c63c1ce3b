"""Makes a process believe in a GPU, so that the CUDA paths run over fake tensors, which have a shape, a dtype and a
device, and no numbers. `pretend` leans on the insides of torch; `Watch` says what is wrong with what it sees.
"""

import contextlib
import ctypes
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch._subclasses import fake_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KNOWN = ("2.11", "2.13", "2.14")  # versions of torch whose insides are as `pretend` takes them to be


def why_not() -> str | None:
    """The reason why nothing can be checked here, if there is one."""
    if torch.cuda.is_available():
        return "there is a GPU: the real thing can be tested (pytest -m gpu)"
    if sys.platform != "linux" or not torch.__version__.startswith(KNOWN):
        return f"leans on the insides of torch {' and '.join(KNOWN)} on Linux; this is {torch.__version__}"
    return None


def pretend() -> None:
    """From here on torch takes this process to have one GPU. Cannot be undone."""
    folder, pointer = Path(torch.__file__).parent / "lib", ctypes.c_void_p
    answer_0, answer_1 = (ctypes.CFUNCTYPE(ctypes.c_int64)(lambda value=value: value) for value in (0, 1))
    kept = [answer_0, answer_1]  # what C++ holds pointers to must outlive this call

    # A build for CPUs has no device guard for CUDA: put one in whose 40 virtual methods all answer 0. torch replaces
    # a guard that finds no devices by one that does nothing.
    libc10 = ctypes.CDLL(str(folder / "libc10.so"))
    guards = (pointer * 2).in_dll(libc10, "_ZN3c104impl26device_guard_impl_registryE")  # CPU, CUDA
    if not guards[1]:
        methods = (pointer * 40)(*[ctypes.cast(answer_0, pointer).value] * 40)
        guard = pointer(ctypes.addressof(methods))
        guards[1] = ctypes.addressof(guard)
        kept += [methods, guard]
    torch._C._ensureCUDADeviceGuardSet()

    # Autograd asks at::CUDAHooksInterface whether CUDA is built in (its virtual method 2) and whether a device is in
    # use (method 4): a copy of its table says yes to both. The two words before a table describe its class.
    get_hooks = ctypes.CDLL(str(folder / "libtorch_cpu.so"))["_ZN2at6detail12getCUDAHooksEv"]
    get_hooks.restype = pointer
    hooks = pointer.from_address(get_hooks())
    table = (pointer * 122)(*(pointer * 122).from_address(hooks.value - 2 * 8))
    table[2 + 2] = table[2 + 4] = ctypes.cast(answer_1, pointer).value
    hooks.value = ctypes.addressof(table) + 2 * 8
    pretend.kept = [*kept, table]
    torch.autograd.set_multithreading_enabled(False)  # no thread for a device that is not there

    fake_tensor.init_gpu_context = lambda device: None
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)
    fake_tensor.CONSTANT_NUMEL_LIMIT = 0  # small tensors have no numbers either
    for name in ("is_available", "is_initialized", "device_count"):
        setattr(torch.cuda, name, lambda *_: 1)
    for name in ("current_device", "is_current_stream_capturing", "max_memory_allocated", "set_device"):
        setattr(torch.cuda, name, lambda *_: 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0)
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)  # torch.compile puts it back
    torch.cuda.set_rng_state = lambda *_: None
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.current_stream = MagicMock
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda *_: None
    torch.Tensor.pin_memory = _pin_memory
    F.scaled_dot_product_attention = _scaled_dot_product_attention


def _pin_memory(tensor):
    tensor.is_in_pinned_memory = True
    return tensor


def _scaled_dot_product_attention(q, k, v, is_causal=False, enable_gqa=False):
    """The kernel that torch would choose on CUDA: sdp_utils.cpp's conditions, from compute capability 8.0 on."""
    half, heads, size = q.dtype != torch.float32, q.shape[1], q.shape[3]
    assert enable_gqa or heads == k.shape[1]
    if half and size <= 256:
        q, k, v = (F.pad(x, (0, -size % 8)) for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0][..., :size]
    if heads == k.shape[1] and size % (8 if half else 4) == 0:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal)[0]
    k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    return torch.softmax(q @ k.transpose(2, 3), -1) @ v  # all scores in memory


PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "_flash_attention_forward", "_varlen_attn", "_varlen_attn_backward",
            "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention"}
FLASH = {"_flash_attention_forward", "_varlen_attn", "_varlen_attn_backward"}
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}  # the host asks for a number


class Watch(TorchDispatchMode):
    """Sees every operation below autograd, compiled ones too, and raises AssertionError where CPU tensors meet CUDA
    ones, where dtypes differ in a product, where FlashAttention would refuse its arguments, and where a graph
    captures what is not the device's work or is replayed after its memory has gone. Numbers that are read are ones.
    (Operations whose shapes depend on numbers, which wait too, raise an exception of FakeTensorMode's own.)

    waits: how often the host waited for the device: it read, or it copied but from pinned memory, while there was
    work under way. places: where. seen: operations by name, how often. largest: elements of the largest tensor made.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.places, self.seen, self.largest = 0, [], Counter(), 0
        self.working, self.graph = False, None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else torch.compile would compile nothing under this mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [x for x in tree_leaves([args, kwargs]) if isinstance(x, torch.Tensor)]
        if name in READS:
            self._wait()
            return 1.0 if given[0].is_floating_point() else 1
        if torch.is_inference_mode_enabled() and func.namespace == "aten":  # composite ones come whole: look inside
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if name in PRODUCTS:
            self._check_product(func, args, kwargs)
        if func is torch.ops.aten.addmm.dtype_out:  # whose fake kernel fails in 2.11
            out = kwargs["out"]
        else:
            out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in given + made}
        if devices == {"cpu", "cuda"}:
            assert name in ("_to_copy", "copy_"), f"{func} takes CPU tensors beside CUDA ones"
            if not (kwargs.get("non_blocking") and all(hasattr(x, "is_in_pinned_memory") or x.is_cuda for x in given)):
                self._wait()
        if self.graph:
            assert devices <= {"cuda"}, f"{func} in a graph uses the CPU"
            self.graph.uses(given, made)
        self.working |= "cuda" in devices and not func.is_view
        self.seen[str(func)] += 1
        self.largest = max([self.largest, *(x.numel() for x in made)])
        return out

    def _wait(self):
        assert not self.graph, "the host waits in a graph"
        if self.working:
            self.waits += 1
            self.places.append("".join(traceback.format_stack(limit=12)[:-2]))
        self.working = False

    def _check_product(self, func, args, kwargs):
        name, keywords = func.overloadpacket.__name__, list(kwargs.values())
        factors = args[1:3] if "dtype" in func._overloadname else args[:3]  # not the fp32 sum that is added to
        dtypes = {x.dtype for x in factors if isinstance(x, torch.Tensor)}
        assert len(dtypes) == 1, f"{func} of {dtypes}"
        if name in FLASH:  # flash_api.cpp, mha_varlen_fwd
            tensors = [x for x in [*args, *keywords] if isinstance(x, torch.Tensor)]
            heads = [x for x in tensors if x.ndim == 3]
            assert dtypes <= {torch.bfloat16, torch.float16} and all(x.shape[2] % 8 == 0 for x in heads), f"{func}"
            assert all(x.shape[2] <= 256 and x.stride(2) == 1 for x in heads), f"{func}"
            for x in tensors:
                if not x.is_floating_point() and x.dtype != torch.uint64:  # bounds, lengths; but the random state
                    assert x.dtype == torch.int32 and x.is_contiguous(), f"{func} of {x.dtype} lengths"

    @contextlib.contextmanager
    def capture(self, graph):
        """In place of torch.cuda.graph."""
        self.graph = graph
        yield
        self.graph = None


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.inside, self.outside = {}, {}  # memory, by address, that it makes and that it finds

    def uses(self, given, made):
        for place, tensors in ((self.outside, given), (self.inside, made)):
            for memory in (StorageWeakRef(x.untyped_storage()) for x in tensors):
                if memory.cdata not in self.inside and memory.cdata not in self.outside:
                    place[memory.cdata] = memory

    def replay(self):
        assert not any(memory.expired() for memory in self.outside.values()), "a graph is replayed on freed memory"

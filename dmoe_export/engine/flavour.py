"""TensorRT and TensorRT-RTX: everything in which the two differ is in this file."""

from __future__ import annotations

import ctypes
import importlib
import sys
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, MissingRequirementError
from ..extras import pip_install
from .plugins import INSTALLED
from .settings import FlavourName

RTX_DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")
_RTX_STUB = "libtensorrt_rtx.so"


@dataclass(frozen=True)
class Flavour:
    """A TensorRT that is installed here: its module and its name."""

    name: FlavourName
    trt: Any

    @property
    def version(self) -> str:
        """The library's version, which an engine is bound to."""
        return str(self.trt.__version__)

    @property
    def is_rtx(self) -> bool:
        """TensorRT-RTX builds for named targets and needs no GPU."""
        return self.name == "tensorrt-rtx"

    def targets(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """The targets to build for.

        Raises InputError for one that cannot be named, MissingRequirementError where a GPU is needed and missing.
        """
        if self.is_rtx:
            chosen = wanted or RTX_DEFAULT_TARGETS
            known = sorted((n.lower() for n in vars(self.trt.ComputeCapability) if n.startswith("SM")),
                           key=lambda t: int(t[2:]))
            for target in chosen:
                if target not in known:
                    raise InputError(f"TensorRT-RTX {self.version} cannot build for {target}; it names "
                                     f"{', '.join(known)}; for other GPUs use --flavour tensorrt on such a GPU.")
            return chosen
        here = _gpu_of_this_machine()
        if here is None:
            raise MissingRequirementError(
                f"TensorRT {self.version} builds only for the GPU it runs on and this machine has none; use --flavour "
                f"tensorrt-rtx ({pip_install('rtx')}), or build on the device.")
        if wanted and wanted != (here,):
            raise InputError(f"TensorRT {self.version} builds only for this machine's GPU, {here}, not for "
                             f"{','.join(wanted)}; leave --targets out, or use --flavour tensorrt-rtx.")
        return (here,)

    def check_flags(self, flags: tuple[str, ...]) -> None:
        """Refuse flags that do not work in this flavour, with the reason (InputError)."""
        reasons = {
            "hardware-compatible": "its engines run on Ampere and later anyway; choose GPUs with --targets",
            "version-compatible": "its builder does not make version-compatible engines",
            "refit": "its refittable engines fail to build without a GPU once they hold weights",
        }
        for flag in flags if self.is_rtx else ():
            raise InputError(f"--{flag} does not work with TensorRT-RTX {self.version}: {reasons[flag]}.")

    def prepare_plugins(self) -> None:
        """What must be true before the parser adds a plugin."""
        if not self.is_rtx:
            return
        # RTX's parser opens libtensorrt_rtx.so, a name its wheel does not have, and aborts the process without it.
        stub = INSTALLED / _RTX_STUB
        try:
            ctypes.CDLL(_RTX_STUB)  # an SDK on the library path, or loaded before
        except OSError:
            try:
                ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise MissingRequirementError(
                    f"TensorRT-RTX needs {stub} to take plugins ({error}); build it with `make plugins`.") from None

    def configure(self, config: Any, targets: tuple[str, ...], flags: tuple[str, ...]) -> None:
        """Set targets and compatibility."""
        trt = self.trt
        if self.is_rtx:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # without it a stream cannot be captured
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
            return
        if "hardware-compatible" in flags:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if "version-compatible" in flags:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if "refit" in flags:
            config.set_flag(trt.BuilderFlag.REFIT)

    def network_flags(self) -> int:
        """Precision is decided at export, so networks are strongly typed."""
        return 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def find_flavour(name: FlavourName | None = None) -> Flavour:
    """The flavour asked for, or TensorRT where it and a GPU exist, else TensorRT-RTX (MissingRequirementError)."""
    if name == "tensorrt":
        return Flavour("tensorrt", _required("tensorrt", "tensorrt"))
    if name is None and _gpu_of_this_machine() is not None:
        try:
            return Flavour("tensorrt", importlib.import_module("tensorrt"))
        except ImportError:
            pass
    return Flavour("tensorrt-rtx", _rtx())


def _rtx() -> Any:
    for module in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        found = getattr(found, "tensorrt_rtx_bindings", found)
        sys.modules.setdefault("tensorrt_rtx", found)  # the name that NVIDIA's own tools import
        return found
    raise MissingRequirementError("TensorRT-RTX is not installed, and neither is TensorRT with a GPU; install with: "
                                  f"{pip_install('rtx')} (no GPU needed), or {pip_install('tensorrt')}.")


def _required(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingRequirementError(f"{module} is not installed ({error}); install with: "
                                      f"{pip_install(extra)}.") from None


def _gpu_of_this_machine() -> str | None:
    """Compute capability of the first GPU, such as sm90; None without a driver or GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    for attribute, out in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(out), attribute, 0):
            return None
    return f"sm{major.value}{minor.value}"

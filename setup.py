"""Builds the C++ extension where there is a compiler; the rest stands in pyproject.toml.

CHILDTUNE_BUILD_EXT=0 leaves the extension out. Without a compiler it is left out too, and the package
says so when it is used. A compiler that fails is an error: nobody shall get the slow reference
without knowing.
"""

import os
import shutil
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
NOTE = ROOT / "childtune_kernels" / "_extension_absent.txt"
# The first torch whose stable ABI has all we use; the extension runs on this one and every later one.
TORCH_TARGET_VERSION = "0x020b000000000000"
COMPILE_ARGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-ffp-contract=off",  # SPEC.md: no operation is contracted into a fused multiply-add
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wno-maybe-uninitialized",  # GCC 12 sees ghosts in its own AVX-512 header
    "-Wno-uninitialized",
    "-Wno-psabi",  # wide vectors pass between inlined functions only
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]


def reason_to_leave_out() -> str | None:
    """Why the extension is not built, or None."""
    if os.environ.get("CHILDTUNE_BUILD_EXT") == "0":
        return "left out at installation by CHILDTUNE_BUILD_EXT=0"
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(candidate.split()[0]) for candidate in candidates):
        return f"no C++ compiler was found at installation (looked for {', '.join(candidates)})"
    return None


def extension() -> tuple[list[Extension], dict[str, type]]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[hi]*"))
    module = CppExtension(
        "childtune_kernels._C",
        sources,
        depends=headers,
        extra_compile_args={"cxx": COMPILE_ARGS},
        py_limited_api=True,
    )
    return [module], {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}


reason = reason_to_leave_out()
NOTE.unlink(missing_ok=True)
if reason is None:
    modules, commands = extension()
    setup(
        ext_modules=modules,
        cmdclass=commands,
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    NOTE.write_text(reason + "\n")
    for stale in (ROOT / "childtune_kernels").glob("_C*.so"):
        stale.unlink()
    print(f"childtune_kernels: the C++ extension is left out: {reason}")
    setup()

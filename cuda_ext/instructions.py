"""Instruction sets: native code is built once for each that it is used on."""

import torch

FLAGS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ),
}
"""What tells a compiler to use each set; narrowest first."""


def available() -> tuple[str, ...]:
    """The sets of this processor, narrowest first; as torch sees it, so `$ATEN_CPU_CAPABILITY` restricts both."""
    sets = tuple(FLAGS)
    widest = torch.backends.cpu.get_cpu_capability().lower()
    return sets[: sets.index(widest) + 1] if widest in sets else sets[:1]

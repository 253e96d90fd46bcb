# SPDX-License-Identifier: Apache-2.0
"""How much shared memory the largest kernel of each op takes, as it was compiled.

Compilers decide that, so it is written down, per generation of GPUs that they compile alike for.
`tests/test_triton_targets.py` compares it with what they make of the kernels.
"""

from __future__ import annotations

# op -> generation -> KiB of a program
KIB: dict[str, dict[str, int]] = {
    "contrastive": {},
    "correlation": {},
    "gram_mse": {},
    "lsh_bce": {},
    "pairwise": {},
    "pkt": {},
    "relational_kl": {},
    "rkd": {},
    "sampled_similarity": {},
    "triplet": {},
    "triplet_all": {},
}
GENERATIONS = {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}  # by major capability


def generation(name: str) -> str | None:
    """The one that an architecture ("sm_86", "gfx942") belongs to; None for the interpreter."""
    if name.startswith("gfx"):
        return "gfx942"
    if name.startswith("sm_"):
        return GENERATIONS.get(int(name[3:]) // 10, "sm_120")
    return None


def refuse_shared(op: str, name: str, shared_bytes: int) -> str | None:
    """Why a GPU that gives a program so much shared memory cannot run an op; None if it can."""
    kib = KIB.get(op, {}).get(generation(name) or "", 0)
    if kib << 10 <= shared_bytes:
        return None
    return (
        f"its largest kernel takes {kib} KiB of shared memory on {name}, which gives a program "
        f"{shared_bytes / 1024:.0f}"
    )

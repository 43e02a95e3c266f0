"""Compile every Triton kernel for a Hopper GPU, to PTX and machine code; no GPU needed: run by `test_kernels.py`.

A kernel is built in a usual configuration and in its last, which must fit when the others need too much.
"""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from model.cores.kernels.gpu.decode import merge_kernel, split_kernel
from model.cores.kernels.gpu.prefill import prefill_kernel
from model.cores.kernels.gpu.two_tracks import forward_kernel
from model.cores.kernels.gpu.two_tracks_backward import keys_kernel, queries_kernel, rows_kernel

SHARED_MEMORY = 232448  # bytes of a multiprocessor of an H100
FP32 = {"partial", "lse", "opened_lse", "closed_lse", "delta_both", "delta_closed", "diagonal"}
BF16 = {f"{letter}_{part}" for letter in "abc" for part in "qkv"} | {
    "out", "q", "k", "values", "own", "opened", "closed", "d_opened", "d_closed", "both", "down", "d_q", "d_k",
    "d_values",
}  # fmt: skip
FACTORS = {
    "H": 34, "R_Q": 6, "R_K": 2, "R_V": 2, "DENSE_Q": False, "D": 64, "D_B": 64, "E": 64, "E_B": 64, "BLOCK_D": 64,
    "BLOCK_E": 64, "RAGGED": True, "PRECISION": "ieee",
}  # fmt: skip
TRACKS = {
    "GROUP_K": 1, "GROUP_V": 1, "GROUP_OWN": 1, "D": 64, "E": 64, "BLOCK_D": 64, "BLOCK_E": 64, "PRECISION": "ieee",
}  # fmt: skip
WIDE = {"D": 256, "E": 256, "BLOCK_D": 256, "BLOCK_E": 256}
WIDE_FACTORS = FACTORS | WIDE | {"H": 8, "R_K": 3, "R_V": 3, "D_B": 256, "E_B": 256}


def kind(name: str) -> str:
    if name in FP32 or name in BF16:
        return "*fp32" if name in FP32 else "*bf16"
    return "*i64" if name == "starts" else "fp32" if name.endswith("scale") else "i32"


def build(kernel, constants: dict, config=None) -> str:
    """The PTX. AssertionError if it takes more shared memory than there is."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {"num_warps": 4}
    constants = constants | (config.kwargs if config else {})
    kernel = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    signature = {p.name: "constexpr" if p.is_constexpr else kind(p.name) for p in kernel.params}
    aligned = [i for i, p in enumerate(kernel.params) if signature[p.name] in ("*bf16", "i32")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    constants = {name: value for name, value in constants.items() if signature.get(name) == "constexpr"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.metadata.shared <= SHARED_MEMORY, (kernel, constants, built.metadata.shared)
    return built.asm["ptx"]


def main() -> None:
    for kernel, at_64, at_256, config in ((split_kernel, 64, 16, 0), (prefill_kernel, None, None, 2)):
        ptx = build(kernel, FACTORS | {"BLOCK_C": at_64}, kernel.configs[config])
        assert "wgmma.mma_async" in ptx and "cp.async" in ptx  # tensor cores, fed while they work
        build(kernel, WIDE_FACTORS | {"BLOCK_C": at_256}, kernel.configs[-1])
    for kernel in (forward_kernel, queries_kernel, keys_kernel):
        ptx = build(kernel, TRACKS | {"CLOSED": True}, kernel.configs[2])
        assert "wgmma.mma_async" in ptx and "cp.async" in ptx
        build(kernel, TRACKS | WIDE | {"CLOSED": True}, kernel.configs[-1])
    build(merge_kernel, {"R_V": 2, "E": 64, "BLOCK_E": 64, "BLOCK_SPLITS": 64})
    build(rows_kernel, TRACKS | {"CLOSED": True, "BLOCK": 32})


if __name__ == "__main__":
    main()

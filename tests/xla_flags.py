"""XLA's flags for tests: most of their time is compilation, and most of that is LLVM's."""

# Only LLVM's own passes: what XLA does with the program before them stays as users have it.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def devices(count: int) -> str:
    """So many virtual devices, quickly compiled for."""
    return f"{QUICK} --xla_force_host_platform_device_count={count}"

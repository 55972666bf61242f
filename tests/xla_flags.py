"""XLA's flags for tests: most of their time is compilation, and most of that is LLVM's."""

import os

# Only LLVM's own passes: what XLA does with the program before them stays as users have it.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

AS_USERS = "GRAPE_TESTS_COMPILE_AS_USERS_DO"  # an environment variable; tests run without QUICK


def devices(count: int) -> str:
    """So many virtual devices, quickly compiled for unless `AS_USERS` is set."""
    how = "" if os.environ.get(AS_USERS) else QUICK
    return f"{how} --xla_force_host_platform_device_count={count}".strip()

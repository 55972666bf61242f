"""python -m benchmarks.pytorch TASK OUT"""

import sys
from pathlib import Path


def main() -> None:
    # transformers and TRL import it where they find it; nothing here needs it, and a build for CUDA
    # cannot be loaded beside a torch for the CPU.
    sys.modules["torchvision"] = None
    from benchmarks.pytorch.run import run

    task, out = (Path(argument) for argument in sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    try:
        run(task, out)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

r"""Reports whether a run fits a TPU slice, without a TPU.

    python -m grape_jax.compile --config=configs/emoji.py --topology=v5e:4x4 \
        --config.policy.path=Qwen/Qwen2.5-7B-Instruct --config.policy.dtype=bfloat16 \
        --config.mesh.tensor=4 --corpus_size=16000000

Compiles the run's programs with the real TPU compiler, which `pip install 'grape_jax[tpu]'`
installs. Needs only the config files of policy and retriever: no weights, no data. Prints memory
and work of each program on one chip and a verdict; exits with 1 if the run does not fit.
docs/scaling.md explains the output.
"""

import sys

import jax
from absl import flags

from grape_jax.run import fit
from grape_jax.runtime import command_line
from grape_jax.runtime.errors import UserError, exit_with_sentence


def main() -> None:
    command_line.define_config()
    flags.DEFINE_string("topology", None, "A slice: v5e:16x16, v6e:8x8, v5p:4x4x4, v4:4x4x4, ...")
    flags.DEFINE_integer("corpus_size", 1_000_000, "Items in the corpus.", lower_bound=1)
    command_line.parse()
    jax.config.update("jax_platforms", "cpu")
    values = flags.FLAGS
    if values.topology is None:
        raise UserError("no topology is given: add --topology=v5e:16x16.")
    sys.exit(0 if fit.report(values.config, values.topology, values.corpus_size) else 1)


if __name__ == "__main__":
    exit_with_sentence(main)

"""Writes a run's trained policy for other programs.

    python -m grape_jax.export --workdir=runs/emoji --out=policy
    python -m grape_jax.export --workdir=runs/emoji --out=adapter --adapter

The first is a Hugging Face directory, the adapter merged in, with the vision encoder if there is
one; the second a PEFT adapter directory, with its base beside it unless the run's base is a Hugging
Face directory. Both come with a model card and with rewriter.json: prompts, output format and
decoding.
"""

from pathlib import Path

from absl import flags

from grape_jax.run import exported
from grape_jax.run.policy import merged_parameters
from grape_jax.run.rewriter import restore
from grape_jax.runtime import command_line, files
from grape_jax.runtime.errors import UserError, exit_with_sentence
from grape_jax.weights import huggingface, pretrained, processor


def main() -> None:
    flags.DEFINE_string("workdir", None, "The run.")
    flags.DEFINE_string("out", None, "The directory to write.")
    flags.DEFINE_bool("adapter", False, "Write the adapter alone, for PEFT.")
    command_line.parse()
    if flags.FLAGS.workdir is None or flags.FLAGS.out is None:
        raise UserError("give both --workdir=RUN and --out=DIR.")
    command_line.quiet()
    export(files.path(flags.FLAGS.workdir), Path(flags.FLAGS.out), flags.FLAGS.adapter)


def export(workdir: Path, out: Path, adapter: bool) -> None:
    """Writes the newest checkpoint's policy.

    Raises:
      UserError: there is no run or no adapter, or the directory cannot be written.
    """
    run, trained = restore(workdir)
    policy = run.policy
    if not adapter:
        params = merged_parameters(policy, trained)
        if policy.vision is None:
            huggingface.save(out, policy.model, params, policy.tokenizer, policy.stop_ids)
        else:
            seen = policy.vision
            huggingface.save_vision_language(out, seen.directory, params)
            processor.write_bounds(out, seen.processor.grid)
    elif policy.lora is None:
        raise UserError(f"{workdir} has trained all parameters: export it without --adapter.")
    else:
        base = exported.base_of(run.config.policy.path, policy, out)
        kind = pretrained.model_type(base)
        huggingface.save_adapter(out, trained, policy.lora, base, kind)
    exported.write_card(out, run.config, policy, workdir)
    print(f"written: {out}")


if __name__ == "__main__":
    exit_with_sentence(main)

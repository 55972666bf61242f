from grape_jax.run.loop import main
from grape_jax.runtime.errors import exit_with_sentence

if __name__ == "__main__":
    exit_with_sentence(main)

"""A rewriter of the tiny policy, untrained, on one device: no run is trained for it."""

import jax
import official_files

from configs import cirr, emoji_noisy
from grape_jax import prepare
from grape_jax.retrieval import encoder
from grape_jax.run import context, policy
from grape_jax.run.galleries import Galleries
from grape_jax.run.picture_captions import PictureCaptions
from grape_jax.run.queries import Queries
from grape_jax.run.rewriter import Rewriter
from grape_jax.runtime import checkpoint, sharding

PROMPT_TOKENS = 48


def load(config) -> Rewriter:
    """The rewriter of a config, as `Rewriter.load` makes it of a run."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    opened = policy.open_model(config)
    lengths = (*config.prompt.buckets, config.prompt.max_tokens or PROMPT_TOKENS)
    loaded = policy.load(config, opened, lengths, mesh)
    retriever = encoder.place(encoder.load(), mesh)
    galleries, queries = Galleries(config, retriever, mesh), Queries(config)
    captions = PictureCaptions(config, retriever, galleries, queries)
    parts = context.Context(config, mesh, loaded, retriever, galleries, queries, captions)
    return Rewriter(parts, policy.untrained_variables(loaded))


def emoji_config(folder):
    """The quickstart's config with the data and the policy of the fixture `folder`."""
    config = emoji_noisy.get_config()
    config.data_dir, config.policy.path = str(folder / "data"), str(folder / "tiny.gguf")
    config.prompt.max_tokens = PROMPT_TOKENS
    config.evaluation.max_tokens = 6
    return config


def composed_config(folder, place):
    """A config of composed queries, whose pictures and words are written to `place`."""
    config = cirr.get_config()
    config.data_dir, config.policy.path = str(place / "data"), str(folder / "tiny.gguf")
    config.retriever.path = ""
    config.prompt.max_tokens = 96
    config.evaluation.max_tokens = 6
    prepare.prepare("cirr", str(official_files.cirr(place / "official")), place / "data")
    return config


def save(rewriter: Rewriter, workdir):
    """Writes a run whose adapter is random, as training would leave it."""
    run, key = rewriter.context, jax.random.key(0)
    state = run.initial_state("grpo")
    drawn = jax.tree.map(lambda x: 0.05 * jax.random.normal(key, x.shape, x.dtype), state.trained)
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint.write_config(workdir, run.config)
    with checkpoint.open_manager(workdir, keep=1) as manager:
        about = {"about": run.identity()}
        checkpoint.save(manager, 1, state.replace(trained=drawn), about, {})
        checkpoint.wait(manager)

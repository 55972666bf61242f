"""The default retriever: a small CLIP trained on emoji pictures of several styles.

    npm install @iconify-json/noto @iconify-json/noto-v1 @iconify-json/fxemoji \
        @iconify-json/fluent-emoji-flat @iconify-json/fluent-emoji @iconify-json/twemoji \
        @iconify-json/emojione @iconify-json/streamline-emojis \
        cldr-annotations-full cldr-annotations-derived-full
    python -m recipes.retriever.train --config=configs/retriever.py \
        --npm=node_modules --out=runs/retriever

Expected result, with the 1,640 English names as queries over all gallery pictures: R@1 12, R@10 35
after phase 1 (gallery style unseen), R@1 82, R@10 99 at the end (gallery pictures seen). Takes
35 minutes on 2 CPU cores and 2 GB of memory. See grape_jax/retrieval/assets/retriever/README.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()
    config.model.image_size = 64  # pixels
    config.model.patch = 16  # pixels
    config.model.vision_width = 256
    config.model.vision_layers = 4
    config.model.text_width = 256
    config.model.text_layers = 3
    config.model.head_dim = 64
    config.model.projection = 192  # width of the shared space
    config.model.context = 24  # text tokens, start and end included
    config.model.vocab = 4096  # at most; BPE stops earlier if no pair repeats

    config.batch = 128  # pairs
    config.short_text = 16  # tokens; three of four batches are truncated to this length, for speed
    # Phase 1 sees the other styles only. Phase 2 adds the gallery's own pictures.
    config.phase1_steps = 1500
    config.phase2_steps = 1100
    config.gallery_share = 0.5  # of the pictures of phase 2

    config.proxy_weight = 0.5  # of the loss against one learned vector for each concept
    config.optimizer = "muon"  # or "adamw"
    config.lr = 1e-3  # of adamw, also for the parameters that muon does not update
    config.muon_lr = 0.02
    config.weight_decay = 0.05
    config.warmup = 100  # steps, at the start of each phase
    config.save_every = 250  # steps
    config.log_every = 25  # steps
    return config

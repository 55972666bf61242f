"""A table of a step's rewrites for the terminal."""

from collections.abc import Sequence

SHOWN_QUERIES = 3


def rewrite_table(step: int, entries: Sequence[dict]) -> str:
    """The queries with the widest spread of ranks, each with its best, middle and worst rewrite.

    Texts are in the last column, because the width of other scripts is unknown.

    Args:
      step: from 0; printed from 1.
      entries: one for each query, as in rewrites.jsonl.
    """
    ranked_of = lambda entry: sorted(entry["rewrites"], key=lambda rewrite: rewrite["rank"])
    spread = lambda entry: ranked_of(entry)[-1]["rank"] - ranked_of(entry)[0]["rank"]
    lines = [f"step {step + 1}" + f"{'rank':>9}{'reward':>9}  rewrite"]
    for entry in sorted(entries, key=spread, reverse=True)[:SHOWN_QUERIES]:
        reference = f", which is {entry['reference']!r}" if entry["reference"] else ""
        lines.append(f"  {entry['query']!r}{reference}")
        ranked = ranked_of(entry)
        for i in sorted({0, len(ranked) // 2, len(ranked) - 1}):
            one = ranked[i]
            text = repr(one["text"])
            if not one["well_formed"]:
                text = f"malformed: {one['completion']!r}"
            lines.append(f"{one['rank']:15d}{one['reward']:9.3f}  {text}")
    return "\n".join(lines)

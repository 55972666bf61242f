"""The table of a step's rewrites on the terminal."""

from grape_jax.reporting.rewrite_table import rewrite_table


def test_a_few_rewrites_of_a_step_can_be_read():
    """The queries that differ most, each with its best, middle and worst rewrite."""

    def one(text, rank, completion=None):
        entry = {"text": text, "rank": rank, "reward": 1 / rank, "well_formed": completion is None}
        return entry if completion is None else entry | {"completion": completion}

    spreads = {"aple": [7, 1, 3], "dgo": [5, 5, 5], "sum": [90, 2, 8], "cta": [2, 3, 4]}
    table = [
        {"query": query, "reference": query[::-1], "rewrites": [one(f"is {r}", r) for r in ranks]}
        for query, ranks in spreads.items()
    ]
    table[2]["rewrites"][0] = one("is", 90, "is\n90")
    lines = rewrite_table(14, table).splitlines()
    assert lines[0].split() == ["step", "15", "rank", "reward", "rewrite"]
    shown = [line.split()[0] for line in lines if "which is" in line]
    assert shown == ["'sum',", "'aple',", "'cta',"]
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["2", "0.500"], ["8", "0.125"], ["90", "0.011"],
    ]  # fmt: skip
    assert lines[4].endswith("malformed: 'is\\n90'")
    assert len({line.index("0.") for line in lines if " 0." in line}) == 1
    for row in table:
        row["reference"] = ""
    assert rewrite_table(14, table).splitlines()[1] == "  'sum'"
